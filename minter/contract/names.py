"""Names on the broker: what clients, workers and RabbitMQ's permissions agree on.

Clients may write to REQUEST_EXCHANGE and read queues below their own reply prefix, nothing else.
"""

MINT = "minter.mint"
FILL_JOB = "minter.fill_job"
RENEW = "minter.renew"
FETCH = "minter.fetch"
REPORT = "minter.report"
CANCEL = "minter.cancel"
SCHEMAS = {
    MINT: "mint-request.json",
    FILL_JOB: "fill-request.json",
    RENEW: "renew-request.json",
    FETCH: "fetch-request.json",
    REPORT: "report-request.json",
    CANCEL: "cancel-request.json",
}
"""The schema of each public task's argument; schemas/answer.json is that of every answer."""
PUBLIC_TASKS = tuple(SCHEMAS)


def endpoint(task: str) -> str:
    """Return the last part of a task's URL over HTTP."""
    return task.rpartition(".")[2]


REQUEST_EXCHANGE = "minter.requests"
REQUEST_QUEUE = "minter.requests"
INTERNAL_EXCHANGE = "minter.internal"
INTERNAL_QUEUE = "minter.internal"
DEAD_LETTER_QUEUE = "minter.dead"

DIRECT_REPLY = "amq.rabbitmq.reply-to."
"""RabbitMQ's direct reply-to: it can only reach the channel that sent the request."""
REPLY_PREFIX = "minter.reply."


def reply_prefix(client: str) -> str:
    """Return what every reply queue of a client begins with."""
    return f"{REPLY_PREFIX}{client}."
