"""Statistics that several services need: mathematics only."""
