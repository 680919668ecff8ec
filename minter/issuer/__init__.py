"""The HTTP service: token endpoint, tasks over HTTP, and what is published."""
