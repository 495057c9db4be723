"""Encoder, decoder and label model of a run, as functions of arrays.

They are read from the store.
"""

from collections.abc import Callable

import numpy as np
from defuse.v1 import run_pb2

from services.arrays import Array
from services.onnx_graph.onnx_files import in_batches, onnx_function
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_BATCH = 256


def read_decoder(store: ArtifactStore, config: run_pb2.RunConfig) -> Callable[[Array], Array]:
    """Return the decoder of a run's VAE.

    It maps latents (n, d) to images (n, c, h, w) in [0, 1]. Values of a user's decoder outside [0, 1] are clipped, as
    in the search.
    """
    decode = _first_output(store.read_bytes(keys.vae(config, "decoder.onnx")))
    return lambda z: np.clip(decode(z), 0, 1)


def read_encoder(store: ArtifactStore, config: run_pb2.RunConfig) -> Callable[[Array], Array]:
    """Return the encoder of a run's VAE.

    It maps images (n, c, h, w) in [0, 1] to posterior means (n, d).
    """
    return _first_output(store.read_bytes(keys.vae(config, "encoder.onnx")))


def read_label_model(store: ArtifactStore, config: run_pb2.RunConfig) -> Callable[[Array], Array]:
    """Return the label model of a run.

    It maps latents (n, d) to probabilities (n, k) of the model's classes.
    """
    return _first_output(store.read_bytes(keys.label_model_onnx(config)))


def _first_output(file: bytes) -> Callable[[Array], Array]:
    function = onnx_function(file)
    return lambda inputs: in_batches(lambda part: function(part)[0], inputs.astype(np.float32), _BATCH)
