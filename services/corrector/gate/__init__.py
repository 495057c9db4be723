"""The gate, which decides whether a candidate may replace the champion."""
