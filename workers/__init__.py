"""The Celery side of Minter: all knowledge of Celery and of queues is in this package."""
