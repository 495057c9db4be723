"""Regions of finished runs, and their annotations."""
