"""Serves the seven tasks of the contract."""
