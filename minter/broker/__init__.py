"""Queues, publishing and broker administration."""
