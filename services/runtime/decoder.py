"""The decoder that a run's search used, as a function of latents."""

from collections.abc import Callable

import numpy as np
from defuse.v1 import run_pb2

from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.sessions import Array, in_batches, onnx_function

_BATCH = 256


def read_decoder(store: ArtifactStore, config: run_pb2.RunConfig) -> Callable[[Array], Array]:
    """Return the decoder of a run's VAE: latents (n, d) to images (n, c, h, w) in [0, 1]."""
    decode = onnx_function(store.read_bytes(catalog.vae(config, "decoder.onnx")))
    return lambda z: in_batches(lambda part: decode(part)[0], z.astype(np.float32), _BATCH)
