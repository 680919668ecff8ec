"""Storages: dialects, look-up by URL, imports, and the configuration that sites need."""
