"""What generator, distiller and corrector share of the latent space."""
