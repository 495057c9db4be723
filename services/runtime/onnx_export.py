"""torch modules as ONNX files: one exporter, one opset, any batch size."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_OPSET = 18


def to_onnx(module: nn.Module, example_shape: Sequence[int], *, inputs: list[str], outputs: list[str]) -> bytes:
    """Return a module of one input (n, *example_shape), float32, as an ONNX file for any n."""
    device = next(module.parameters()).device
    example = torch.zeros(2, *example_shape, device=device)  # a batch of one would become a constant
    with _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program: install the torch version that constraints.txt names")
    return bytes(program.model_proto.SerializeToString())


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep from whoever reads the log what is no news: torchvision, which nothing here needs, is not installed."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export calls what torch deprecates
            yield
    finally:
        registration.setLevel(level)
