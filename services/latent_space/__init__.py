"""The latent space as generator, distiller and corrector share it."""
