"""Names on the broker: what clients, workers and RabbitMQ's permissions agree on.

Clients may write to REQUEST_EXCHANGE and read queues below their own reply prefix, nothing else.
"""

MINT = "minter.mint"
FILL_JOB = "minter.fill_job"
PUBLIC_TASKS = (MINT, FILL_JOB)

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
