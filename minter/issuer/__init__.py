"""The HTTP service: token endpoint, tasks over HTTP, and the published keys and discovery documents."""
