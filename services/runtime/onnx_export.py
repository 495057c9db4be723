"""torch modules as ONNX files: one exporter, one opset, any batch size."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

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
    """Return a module of one input (n, *example_shape) as an ONNX file, for any n or for one batch size alone."""
    device = next(module.parameters()).device
    # A batch of one would become a constant.
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
