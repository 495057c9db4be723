"""Authentication and authorisation: callers by token, calls by the role that they require."""
