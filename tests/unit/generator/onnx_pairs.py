"""Small encoders and decoders as ONNX files, as a user would bring them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Shape = tuple[int, ...]
SHAPE = (1, 2, 3)


def encoder_file(
    shape: Shape = SHAPE,
    *,
    weight: npt.NDArray[Any] | None = None,
    sigma: npt.NDArray[Any] | None = None,
    flat: bool = True,
    summed: bool = False,
) -> bytes:
    """Return an encoder of images (n, *shape) as an ONNX file: `mu = flatten(images) @ weight`, no weight for one.

    With `sigma`, a second output: that many times |mu|. `flat=False` leaves mu in the shape of the images, `summed`
    adds up the batch.
    """
    size = int(np.prod(shape))
    weight = np.eye(size, dtype=np.float32) if weight is None else weight
    nodes = [helper.make_node("Identity" if not flat else "Flatten", ["images"], ["flat"])]
    nodes += [helper.make_node("MatMul", ["flat", "weight"], ["each"])] if flat else []
    last = "each" if flat else "flat"
    nodes.append(
        helper.make_node("ReduceSum", [last, "axes"], ["mu"], keepdims=1)
        if summed
        else helper.make_node("Identity", [last], ["mu"])
    )
    constants = {"weight": weight, "axes": np.array([0])}
    if sigma is not None:
        nodes += [helper.make_node("Abs", ["mu"], ["size"]), helper.make_node("Mul", ["size", "factor"], ["sigma"])]
        constants["factor"] = sigma
    return _file(nodes, {"images": ("n", *shape)}, ["mu", *(["sigma"] if sigma is not None else [])], constants)


def decoder_file(shape: Shape = SHAPE, *, dims: int | None = None, scale: float = 1.0, clipped: bool = True) -> bytes:
    """Return a decoder of latents (n, dims) as an ONNX file: `scale * z`, repeated to the shape, clipped to [0, 1]."""
    size = int(np.prod(shape))
    dims = size if dims is None else dims
    spread = np.tile(np.eye(dims, dtype=np.float32), -(-size // dims))[:, :size] * np.float32(scale)
    nodes = [
        helper.make_node("MatMul", ["z", "spread"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["raw"]),
        helper.make_node("Clip", ["raw", "low", "high"], ["images"])
        if clipped
        else helper.make_node("Identity", ["raw"], ["images"]),
    ]
    constants = {
        "spread": spread,
        "shape": np.array([-1, *shape]),
        "low": np.array(0, np.float32),
        "high": np.array(1, np.float32),
    }
    return _file(nodes, {"z": ("n", dims)}, ["images"], constants)


def _file(
    nodes: Sequence[Any],
    inputs: dict[str, tuple[int | str, ...]],
    outputs: Sequence[str],
    constants: dict[str, npt.NDArray[Any]],
) -> bytes:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
