"""The standard interface to long-running operations."""
