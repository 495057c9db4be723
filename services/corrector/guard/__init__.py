"""The guard: a model that tells the known region of live images."""
