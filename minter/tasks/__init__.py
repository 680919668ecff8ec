"""Serves the six tasks of the contract."""
