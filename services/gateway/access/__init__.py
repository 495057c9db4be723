"""Authentication of callers by token, and authorisation by role."""
