"""The network that is corrected.

It is the served ONNX graph, or a torch module that computes the same.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import safetensors
import safetensors.torch
import torch
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2
from torch import Tensor, nn

from services.arrays import Array, as_floats
from services.corrector.correction_data import CorrectionData
from services.onnx_graph.module import OnnxModule
from services.onnx_graph.onnx_files import largest_difference, to_onnx
from services.onnx_graph.operators import UnsupportedOperator
from services.storage import keys
from services.triton.preprocessing import input_shape, preprocess


class TorchModule(nn.Module):
    """A torch module that computes and is exported as the served model.

    It stays in inference mode, as an ONNX file is: BatchNorm keeps its statistics and Dropout has no effect, whatever
    mode is requested. The export has the deployed names.
    """

    def __init__(self, module: nn.Module, model: model_pb2.Model) -> None:
        super().__init__()
        self.module = module.eval()
        self._model = model
        # Names of the parameters of the last layer.
        self.last_layer = _last_layer(self)

    def train(self, mode: bool = True) -> "TorchModule":  # noqa: ARG002  # torch's own signature
        return super().train(mode=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs (n, k) of inputs in the served model's shape."""
        outputs: Tensor = self.module(images)
        return outputs

    def to_onnx(self) -> onnx.ModelProto:
        """Export the module with the served model's names and batch size."""
        model = self._model
        height, width, channels = model.image_shape
        file = to_onnx(
            self,
            input_shape((1, channels, height, width), model)[1:],
            inputs=[model.input_name],
            outputs=[model.output_name],
            batch_size=model.fixed_batch_size,
            dtype=torch.uint8 if model.input_datatype == "UINT8" else torch.float32,
        )
        return onnx.load_model_from_string(file)

    def weights(self) -> bytes:
        """Return the module's state dict as a safetensors file."""
        return safetensors.torch.save(
            {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}
        )


def build_from_factory(function: str, allowed: Sequence[str], weights: Callable[[], bytes]) -> nn.Module:
    """Call a factory, `module:function`, and load weights into its module.

    The weights are read only after the factory was found. Raises InvalidInput for a factory that is not allowed or
    fails, and for weights that do not fit.
    """
    module = _factory(function, allowed)()
    if not isinstance(module, nn.Module):
        raise InvalidInput(
            f"{function} returned {type(module).__name__}; a factory returns a torch.nn.Module", reason="BAD_FACTORY"
        )
    try:
        found = module.load_state_dict(safetensors.torch.load(weights()), strict=False)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise InvalidInput(
            f"the weights do not fit the module of {function} ({str(error).splitlines()[-1].strip()[:300]}); upload a "
            "safetensors file of its state dict",
            reason="UNFIT_WEIGHTS",
        ) from error
    if found.missing_keys or found.unexpected_keys:
        raise InvalidInput(
            f"the weights do not fit the module of {function}: missing {found.missing_keys[:5]}, unknown "
            f"{found.unexpected_keys[:5]}; upload a safetensors file of its state dict",
            reason="UNFIT_WEIGHTS",
        )
    return module


def _factory(function: str, allowed: Sequence[str]) -> Callable[[], Any]:
    path, _, name = function.partition(":")
    if not path or not name.isidentifier():
        raise InvalidInput(f"torch factory {function!r} is not of the form module:function", reason="BAD_FACTORY")
    if function not in allowed and path not in allowed:
        raise InvalidInput(
            f"torch factory {function!r} is not allowed here, as it runs code in the corrector; its operator names it "
            "in DEFUSE_TORCH_FACTORIES",
            reason="FACTORY_NOT_ALLOWED",
        )
    try:
        factory = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"torch factory {function!r} cannot be imported where the corrector runs ({error}); install it there",
            reason="BAD_FACTORY",
        ) from error
    if not callable(factory):
        raise InvalidInput(f"{function} is no function but {type(factory).__name__}", reason="BAD_FACTORY")
    found: Callable[[], Any] = factory
    return found


def _last_layer(network: nn.Module) -> frozenset[str]:
    """Return the parameter names of the last module with a matrix.

    Modules are in the order of definition.
    """
    found: frozenset[str] = frozenset()
    for path, module in network.named_modules():
        own = list(module.named_parameters(recurse=False))
        if any(weight.ndim > 1 for _, weight in own):
            found = frozenset(f"{path}.{name}" for name, _ in own)
    return found


Network = OnnxModule | TorchModule
# Images on which a factory's module must agree with the served file.
_COMPARED = 64


def deployed_network(data: CorrectionData, allowed_factories: Sequence[str]) -> Network:
    """Return the network with the weights of the version that is corrected.

    Raises InvalidInput for a graph with an operator that cannot be trained, and for a factory whose module does not
    compute the same as the served model.
    """
    wanted = data.correction.config.torch_factory
    if wanted.function:
        module = build_from_factory(wanted.function, allowed_factories, lambda: _weights(data))
        network = TorchModule(module, data.model)
        _check_same(network, data)
        return network
    try:
        return OnnxModule(onnx.load_model_from_string(data.deployed_file))
    except UnsupportedOperator as error:
        raise InvalidInput(
            f"version {data.correction.base_version} of {names.last(data.model.name)!r} cannot be corrected "
            f"from its ONNX file: {error}. The other way in is the classifier as a torch module: name a factory, "
            "module:function, and a safetensors file of its weights (--torch-factory, --weights)",
            reason="UNSUPPORTED_OPERATOR",
        ) from error
    except ValueError as error:
        raise InvalidInput(
            f"version {data.correction.base_version} of {names.last(data.model.name)!r} cannot be read as a "
            f"torch module: {error}",
            reason="UNSUPPORTED_GRAPH",
        ) from error


def real_inputs(data: CorrectionData, count: int) -> Array:
    """Return `count` classifier inputs from training images, repeated if needed."""
    images = data.train.images
    return np.asarray(preprocess(as_floats(images[np.resize(np.arange(len(images)), count)]), data.model))


def _weights(data: CorrectionData) -> bytes:
    """Return the uploaded weights, or those of the base version's correction.

    Raises InvalidInput when there are neither.
    """
    digest = data.correction.config.torch_factory.weights_digest
    if digest:
        return data.store.read_bytes(keys.file(digest))
    key = keys.model_version(data.model.name, data.correction.base_version)
    correction = data.store.read_message(key, model_pb2.ModelVersion).correction
    if correction and data.store.exists(keys.corrected_weights(correction)):
        return data.store.read_bytes(keys.corrected_weights(correction))
    raise InvalidInput(
        f"version {data.correction.base_version} of {names.last(data.model.name)!r} has no torch weights "
        "here; upload a safetensors file of its state dict (--weights)",
        reason="NO_WEIGHTS",
    )


def _check_same(network: TorchModule, data: CorrectionData) -> None:
    inputs = real_inputs(data, data.model.fixed_batch_size or _COMPARED)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(inputs)).numpy()
    difference, bound = largest_difference(data.deployed_file, inputs, outputs)
    if not difference <= bound:
        raise InvalidInput(
            f"the module of {data.correction.config.torch_factory.function} differs by {difference:.3g} from "
            f"version {data.correction.base_version}, as served, on real images; upload its exact weights, and "
            "leave preprocessing to the model's declaration",
            reason="FACTORY_MISMATCH",
        )
