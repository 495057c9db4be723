"""Releases: their start and state, and the retirement of candidates."""
