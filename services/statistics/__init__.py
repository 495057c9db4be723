"""Statistics that several services share: mathematics only."""
