"""Benchmarks and the demo model; nothing of the library imports this."""
