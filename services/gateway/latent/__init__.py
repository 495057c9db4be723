"""The latent space of a run."""
