"""Production traffic at the public door: taken in, kept for a while, deleted on request; alerts told to who listens."""
