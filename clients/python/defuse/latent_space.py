"""The latent space of a run: its VAE as functions of arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.connection import Connection
from defuse.v1 import generator_service_pb2 as pb
from defuse.values import Images


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The frames between two images, and what the model under test answers for each."""

    # (frames, h, w, c)
    images: Images
    # (frames,) class ids
    predicted_labels: tuple[int, ...]


class LatentSpace:
    """Encodes, decodes and interpolates with a run's VAE; at most 1 MiB of images in one call.

    Raises NotReady while the VAE is not trained, InvalidInput for images or latents of another shape.
    """

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection = connection
        self._run = names.run(run_id)

    def encode(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return mean and standard deviation (n, d) of the posteriors of images (n, h, w, c) uint8."""
        answer = self._call("Encode", pb.EncodeRequest(run=self._run, images=tensors.images_to_proto(images)))
        return tensors.floats_from_proto(answer.mu), tensors.floats_from_proto(answer.sigma)

    def decode(self, latents: npt.NDArray[np.floating]) -> Images:
        """Return the images (n, h, w, c) uint8 of latents (n, d)."""
        answer = self._call("Decode", pb.DecodeRequest(run=self._run, latents=tensors.floats_to_proto(latents)))
        return tensors.images_from_proto(answer.images)

    def interpolate(self, first: Images, last: Images, *, frames: int = 30) -> Walk:
        """Return the walk in latent space from one image (h, w, c) to another, both included."""
        ends = tensors.images_to_proto(np.stack([first, last]))
        answer = self._call("Interpolate", pb.InterpolateRequest(run=self._run, ends=ends, frames=frames))
        return Walk(images=tensors.images_from_proto(answer.images), predicted_labels=tuple(answer.predicted_labels))

    def _call(self, method: str, request: Any) -> Any:
        return self._connection.call(method, request)
