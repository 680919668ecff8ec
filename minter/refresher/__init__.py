"""The refresher: keeps managed tokens fresh and pushes them to their clients."""
