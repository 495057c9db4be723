"""Who may do what at the public door: callers by their tokens, calls by the role that they need."""
