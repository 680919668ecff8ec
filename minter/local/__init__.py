"""Minter with embedded servers on one machine, and drills of a provider's outage."""
