"""The corrected graph as a file, with the proof that it computes what was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
import torch
from defuse.errors import Internal
from torch import Tensor

from services.arrays import Array
from services.runtime.sessions import onnx_function

# Largest difference of any output that rounding explains, relative to the largest output.
TOLERANCE = 1e-3


class Exportable(Protocol):
    """A network that can be written down as ONNX."""

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def to_onnx(self) -> onnx.ModelProto: ...


@dataclass(frozen=True, kw_only=True)
class BatchParity:
    """Agreement of torch and ONNX Runtime on one batch."""

    batch_size: int
    max_abs_difference: float


def export(network: Exportable, inputs: Array, batch_sizes: Sequence[int]) -> tuple[bytes, list[BatchParity]]:
    """Return the network as an ONNX file; compare torch and ONNX Runtime on the first inputs for each batch size.

    `network` is on the CPU. `inputs` are real inputs of the classifier, at least as many as the largest batch. Raises
    Internal when the two disagree by more than rounding.
    """
    file = network.to_onnx().SerializeToString()
    parity = []
    for size in batch_sizes:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(inputs[:size])).numpy()
        difference, bound = largest_difference(file, inputs[:size], outputs)
        if not difference <= bound:
            raise Internal(
                f"the exported graph differs from the trained one by {difference:g} at batch size {size}; nothing was "
                "served",
                reason="PARITY",
            )
        parity.append(BatchParity(batch_size=size, max_abs_difference=difference))
    return file, parity


def largest_difference(file: bytes, inputs: Array, outputs: Array) -> tuple[float, float]:
    """Return how far ONNX Runtime's outputs of a file are from those given, at most, and what rounding explains."""
    difference = float(np.abs(onnx_function(file)(inputs)[0] - outputs).max())
    return difference, TOLERANCE * max(1.0, float(np.abs(outputs).max()))
