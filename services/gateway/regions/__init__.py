"""Regions and annotations."""
