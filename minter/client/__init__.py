"""The Python client: over HTTP as it is, over AMQP with the `amqp` extra."""

from minter.client.client import (
    Changed,
    FileOperation,
    FileReport,
    FileRequest,
    FilledJob,
    JobReport,
    LiveToken,
    MinterClient,
    MinterError,
    MintResult,
    Pending,
    Refusal,
    Token,
    new_request_id,
)

__all__ = [
    "Changed",
    "FileOperation",
    "FileReport",
    "FileRequest",
    "FilledJob",
    "JobReport",
    "LiveToken",
    "MintResult",
    "MinterClient",
    "MinterError",
    "Pending",
    "Refusal",
    "Token",
    "new_request_id",
]
