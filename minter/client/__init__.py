"""The Python client: HTTP works without extras, AMQP needs the extra `amqp`."""

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
