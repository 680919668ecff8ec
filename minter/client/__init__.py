"""The Python client: HTTP works without extras, AMQP needs the extra `amqp`."""

from minter.client.bearer import find_bearer_token
from minter.client.client import MinterClient, new_request_id
from minter.client.results import Changed, FilledJob, MintResult, Pending, Refusal, SignedURL, Token
from minter.contract.followups import FileReport, JobReport
from minter.contract.messages import FileOperation, FileRequest, LiveToken
from minter.errors import MinterError

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
    "SignedURL",
    "Token",
    "find_bearer_token",
    "new_request_id",
]
