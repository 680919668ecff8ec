"""Formats of FTS: jobs and monitoring messages."""
