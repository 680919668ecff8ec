"""Minter as a client of an external IAM."""
