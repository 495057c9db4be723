"""The latent space of a run."""

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.steps import Call, Steps
from defuse.v1 import generator_service_pb2 as pb
from defuse.values import Images, Walk


def encode(run_id: str, images: Images) -> Steps[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Return mean and standard deviation (n, d) of the posteriors of images (n, h, w, c) uint8."""
    request = pb.EncodeRequest(run=names.run(run_id), images=tensors.images_to_proto(images))
    answer = yield Call(method="Encode", request=request)
    return tensors.floats_from_proto(answer.mu), tensors.floats_from_proto(answer.sigma)


def decode(run_id: str, latents: npt.NDArray[np.floating]) -> Steps[Images]:
    """Return the images (n, h, w, c) uint8 of latents (n, d)."""
    request = pb.DecodeRequest(run=names.run(run_id), latents=tensors.floats_to_proto(latents))
    answer = yield Call(method="Decode", request=request)
    return tensors.images_from_proto(answer.images)


def interpolate(run_id: str, first: Images, last: Images, *, frames: int = 30) -> Steps[Walk]:
    """Return the walk in latent space from one image (h, w, c) to another, both included."""
    ends = tensors.images_to_proto(np.stack([first, last]))
    answer = yield Call(
        method="Interpolate", request=pb.InterpolateRequest(run=names.run(run_id), ends=ends, frames=frames)
    )
    return Walk(images=tensors.images_from_proto(answer.images), predicted_labels=tuple(answer.predicted_labels))
