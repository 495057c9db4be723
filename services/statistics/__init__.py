"""Statistics that several services share, as pure mathematics."""
