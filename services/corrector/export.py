"""The corrected graph as a file, with the proof that it computes what was trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from defuse.errors import Internal

from services.corrector.curriculum import Array
from services.corrector.onnx_module import OnnxModule
from services.runtime.sessions import onnx_function

# Largest difference of any output that rounding explains, relative to the largest output.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class BatchParity:
    """Agreement of torch and ONNX Runtime on one batch."""

    batch_size: int
    max_abs_difference: float


def export(network: OnnxModule, inputs: Array, batch_sizes: Sequence[int]) -> tuple[bytes, list[BatchParity]]:
    """Write the weights back into their graph; compare torch and ONNX Runtime on the first inputs for each batch size.

    `inputs` are real inputs of the classifier, at least as many as the largest batch. Raises Internal when the two
    disagree by more than rounding.
    """
    network = network.cpu().eval()
    file = network.to_onnx().SerializeToString()
    run = onnx_function(file)
    parity = []
    for size in batch_sizes:
        with torch.inference_mode():
            expected = network(torch.from_numpy(inputs[:size])).numpy()
        difference = float(np.abs(run(inputs[:size])[0] - expected).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise Internal(
                f"the exported graph differs from the trained one by {difference:g} at batch size {size}; nothing was "
                "served",
                reason="PARITY",
            )
        parity.append(BatchParity(batch_size=size, max_abs_difference=difference))
    return file, parity
