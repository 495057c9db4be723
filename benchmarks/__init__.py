"""Measurements against a peer and a limit: `python -m benchmarks.NAME`, one JSON object as the last line."""
