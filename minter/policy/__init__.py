"""Decisions, as functions of plain values: which tokens a client may have, and for how long."""
