"""The Python client: over HTTP as it is, over AMQP with the `amqp` extra."""

from minter.client.client import (
    Alive,
    Awaited,
    Changed,
    FileOperation,
    FileReport,
    FileRequest,
    FilledJob,
    JobReport,
    MinterClient,
    MinterError,
    MintResult,
    Refusal,
    Token,
    new_request_id,
)

__all__ = [
    "Alive",
    "Awaited",
    "Changed",
    "FileOperation",
    "FileReport",
    "FileRequest",
    "FilledJob",
    "JobReport",
    "MintResult",
    "MinterClient",
    "MinterError",
    "Refusal",
    "Token",
    "new_request_id",
]
