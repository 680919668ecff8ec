"""Names on the broker, shared by clients, workers and RabbitMQ's permissions.

Clients may write only to REQUEST_EXCHANGE and to the request exchange of their own, and read only queues
below their own reply prefix and the durable queues listed for them.
"""

MINT = "minter.mint"
FILL_JOB = "minter.fill_job"
URLS = "minter.urls"
RENEW = "minter.renew"
FETCH = "minter.fetch"
REPORT = "minter.report"
CANCEL = "minter.cancel"
SCHEMAS = {
    MINT: "mint-request.json",
    FILL_JOB: "fill-request.json",
    URLS: "urls-request.json",
    RENEW: "renew-request.json",
    FETCH: "fetch-request.json",
    REPORT: "report-request.json",
    CANCEL: "cancel-request.json",
}
"""File in schemas/ for each public task's argument; schemas/answer.json is for every answer."""
PUBLIC_TASKS = tuple(SCHEMAS)


def endpoint(task: str) -> str:
    """Return the last path segment of a task's HTTP URL."""
    return task.rpartition(".")[2]


REQUEST_EXCHANGE = "minter.requests"
REQUEST_QUEUE = "minter.requests"
"""The queue for clients that use no exchange of their own; they wait in one line."""


def client_requests(client: str) -> str:
    """Return the name of a client's own request exchange, its queue and its routing key.

    Clients with queues of their own take turns, however many requests one of them sends.
    """
    return f"{REQUEST_QUEUE}.{client}"


INTERNAL_EXCHANGE = "minter.internal"
INTERNAL_QUEUE = "minter.internal"
DEAD_LETTER_QUEUE = "minter.dead"

DIRECT_REPLY = "amq.rabbitmq.reply-to."
"""Prefix of RabbitMQ's direct reply-to queues, which reach only the channel that sent the request."""
REPLY_PREFIX = "minter.reply."


def reply_prefix(client: str) -> str:
    """Return the prefix of the names of a client's reply queues."""
    return f"{REPLY_PREFIX}{client}."
