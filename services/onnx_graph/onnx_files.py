"""ONNX files: export from torch, ONNX Runtime, and parity of both."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from services.arrays import Array

# The distiller has no onnx.
if TYPE_CHECKING:
    import onnx


def onnx_function(model: bytes) -> Callable[..., list[Array]]:
    """Return a graph as a function of its inputs, in order.

    The function returns a list of outputs. It uses the GPU when this build of ONNX Runtime has one. Raises
    onnxruntime's errors for an invalid file.
    """
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Array) -> list[Array]:
        outputs: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return run


def in_batches(function: Callable[[Array], Array], inputs: Array, batch_size: int) -> Array:
    """Apply a function to slices and concatenate the results.

    Slices along the first axis bound the memory of one call.
    """
    parts = [function(inputs[begin : begin + batch_size]) for begin in range(0, len(inputs), batch_size)]
    return np.concatenate(parts)


_OPSET = 18


def to_onnx(
    module: nn.Module,
    example_shape: Sequence[int],
    *,
    inputs: list[str],
    outputs: list[str],
    batch_size: int = 0,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """Return a module of one input as an ONNX file.

    The input is (n, *example_shape), for any n or for one batch size only.
    """
    device = next(module.parameters()).device
    # A batch size of one would become a constant.
    example = torch.zeros(batch_size or 2, *example_shape, device=device, dtype=dtype)
    with _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=None if batch_size else ({0: torch.export.Dim("n")},),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program: install the torch version that constraints.txt names")
    return bytes(program.model_proto.SerializeToString())


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warning that torchvision is missing.

    Nothing here needs torchvision.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export calls deprecated functions of torch
            yield
    finally:
        registration.setLevel(level)


# Largest difference of any output that rounding explains, relative to the largest output.
TOLERANCE = 1e-3


class ParityError(ArithmeticError):
    """Raised when an exported file does not compute what its network computes.

    The difference is larger than rounding.
    """


class Exportable(Protocol):
    """A network that can be exported to ONNX."""

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def to_onnx(self) -> "onnx.ModelProto": ...


@dataclass(frozen=True, kw_only=True)
class BatchParity:
    """The agreement of torch and ONNX Runtime on one batch."""

    batch_size: int
    max_abs_difference: float


def export(network: Exportable, inputs: Array, batch_sizes: Sequence[int]) -> tuple[bytes, list[BatchParity]]:
    """Return a network as an ONNX file, with parity by batch size.

    Torch and ONNX Runtime are compared on the first inputs for each batch size. `network` is on the CPU. `inputs` are
    real inputs of the classifier, at least as many as the largest batch. Raises ParityError when the two disagree by
    more than rounding.
    """
    file = network.to_onnx().SerializeToString()
    parity = []
    for size in batch_sizes:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(inputs[:size])).numpy()
        difference, bound = largest_difference(file, inputs[:size], outputs)
        if not difference <= bound:
            raise ParityError(f"the exported graph differs from the trained one by {difference:g} at batch size {size}")
        parity.append(BatchParity(batch_size=size, max_abs_difference=difference))
    return file, parity


def largest_difference(file: bytes, inputs: Array, outputs: Array) -> tuple[float, float]:
    """Return the largest difference of outputs, and the bound for rounding.

    The difference is between ONNX Runtime's outputs and the given ones.
    """
    difference = float(np.abs(onnx_function(file)(inputs)[0] - outputs).max())
    return difference, TOLERANCE * max(1.0, float(np.abs(outputs).max()))
