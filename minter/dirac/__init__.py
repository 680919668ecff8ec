"""Per-file tokens of an unmodified DIRAC 9.1, by options of the CS alone (docs/configure-clients.md).

`HandlerPath = minter/dirac/FTS3Agent` makes DIRAC load its own agent from here, with FTS3Job wrapped.
"""
