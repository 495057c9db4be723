"""Access to the latent space of a run, through a generator."""
