"""Minter's processes that consume queues; only this package uses Celery."""
