"""The gate: whether a candidate may replace the champion, on everything known of their model."""
