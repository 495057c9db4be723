"""Whether a candidate may take the place of the version that callers get: measured beside it, on everything known."""
