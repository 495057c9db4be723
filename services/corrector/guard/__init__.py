"""The guard, a model that recognises live images of known regions."""
