"""Releases: Triton versions registered, published, rolled back, in our repository or in an external Triton."""
