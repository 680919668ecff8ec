"""The engine: mints tokens, issues recorded tokens again, and has the keys that sign them."""
