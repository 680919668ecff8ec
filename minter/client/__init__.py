"""The Python client: over HTTP as it is, over AMQP with the `amqp` extra."""

from minter.client.client import (
    FileOperation,
    FileReport,
    FileRequest,
    JobReport,
    LiveToken,
    MinterClient,
    MinterError,
    new_request_id,
)
from minter.client.results import Changed, FilledJob, MintResult, Pending, Refusal, Token

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
