"""Runs: their configuration, start and state."""
