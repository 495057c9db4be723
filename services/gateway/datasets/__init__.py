"""Data sets: their creation from uploaded files and URLs."""
