"""The latent space that generator, distiller and corrector share."""
