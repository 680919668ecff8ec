"""The web console: what runs, what was issued, and a few decisions, for people (docs/console.md)."""
