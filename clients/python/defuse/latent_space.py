"""The latent space of a run: its VAE as functions of arrays."""

import numpy as np
import numpy.typing as npt

from defuse.blocking import perform
from defuse.calls import latent as calls
from defuse.connection import Connection
from defuse.values import Images, Walk


class LatentSpace:
    """Encodes, decodes and interpolates with a run's VAE; at most 1 MiB of images in one call.

    Raises NotReady while the VAE is not trained, InvalidInput for images or latents of another shape.
    """

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection = connection
        self._run = run_id

    def encode(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return mean and standard deviation (n, d) of the posteriors of images (n, h, w, c) uint8."""
        return perform(self._connection, calls.encode(self._run, images))

    def decode(self, latents: npt.NDArray[np.floating]) -> Images:
        """Return the images (n, h, w, c) uint8 of latents (n, d)."""
        return perform(self._connection, calls.decode(self._run, latents))

    def interpolate(self, first: Images, last: Images, *, frames: int = 30) -> Walk:
        """Return the walk in latent space from one image (h, w, c) to another, both included."""
        return perform(self._connection, calls.interpolate(self._run, first, last, frames=frames))
