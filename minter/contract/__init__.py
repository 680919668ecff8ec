"""The wire contract: names on the broker, and the struct of every message."""
