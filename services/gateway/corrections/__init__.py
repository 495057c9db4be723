"""Corrections: their configuration, start and state."""
