"""Authentication and authorisation.

Callers by token, calls by the role that they require.
"""
