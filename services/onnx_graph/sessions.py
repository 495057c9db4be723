"""ONNX files as functions of arrays, run by ONNX Runtime."""

from collections.abc import Callable

import numpy as np
import onnxruntime

from services.arrays import Array


def onnx_function(model: bytes) -> Callable[..., list[Array]]:
    """Return the graph as a function: its inputs in their order, its outputs as a list.

    Takes the GPU where this build of ONNX Runtime has one. Raises onnxruntime's errors for a file that is no model.
    """
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Array) -> list[Array]:
        outputs: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return run


def in_batches(function: Callable[[Array], Array], inputs: Array, batch_size: int) -> Array:
    """Apply a function to slices along the first axis and join the results; bounds the memory of one call."""
    parts = [function(inputs[begin : begin + batch_size]) for begin in range(0, len(inputs), batch_size)]
    return np.concatenate(parts)
