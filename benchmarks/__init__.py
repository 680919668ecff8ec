"""Benchmarks: each file measures one thing and prints JSON."""
