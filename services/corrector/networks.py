"""The network that is corrected: the very graph that is served, or a torch module that computes the same."""

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2

from services.arrays import Array
from services.corrector import torch_module
from services.corrector.materials import Materials
from services.corrector.torch_module import TorchModule
from services.onnx_graph.export import largest_difference
from services.onnx_graph.module import OnnxModule
from services.onnx_graph.operators import UnsupportedOperator
from services.storage import keys
from services.triton.preprocessing import as_floats, preprocess

Network = OnnxModule | TorchModule
# Images on which a factory's module must agree with the served file.
_COMPARED = 64


def deployed(materials: Materials, allowed_factories: Sequence[str]) -> Network:
    """Return the network with the weights of the version that is corrected.

    Raises InvalidInput for a graph with an operator that cannot be trained, and for a factory whose module does not
    compute what is served.
    """
    wanted = materials.correction.config.torch_factory
    if wanted.function:
        module = torch_module.build(wanted.function, allowed_factories, lambda: _weights(materials))
        network = TorchModule(module, materials.model)
        _check_same(network, materials)
        return network
    try:
        return OnnxModule(onnx.load_model_from_string(materials.deployed_file))
    except UnsupportedOperator as error:
        raise InvalidInput(
            f"version {materials.correction.base_version} of {names.last(materials.model.name)!r} cannot be corrected "
            f"from its ONNX file: {error}. The other way in is the classifier as a torch module: name a factory, "
            "module:function, and a safetensors file of its weights (--torch-factory, --weights)",
            reason="UNSUPPORTED_OPERATOR",
        ) from error
    except ValueError as error:
        raise InvalidInput(
            f"version {materials.correction.base_version} of {names.last(materials.model.name)!r} cannot be read as a "
            f"torch module: {error}",
            reason="UNSUPPORTED_GRAPH",
        ) from error


def real_inputs(materials: Materials, count: int) -> Array:
    """Return `count` inputs of the classifier, from training images, repeated where there are fewer."""
    images = materials.train.images
    return np.asarray(preprocess(as_floats(images[np.resize(np.arange(len(images)), count)]), materials.model))


def _weights(materials: Materials) -> bytes:
    """Return the uploaded weights; without any, those that the correction behind the base version left."""
    digest = materials.correction.config.torch_factory.weights_digest
    if digest:
        return materials.store.read_bytes(keys.file(digest))
    key = keys.model_version(materials.model.name, materials.correction.base_version)
    correction = materials.store.read_message(key, model_pb2.ModelVersion).correction
    if correction and materials.store.exists(keys.corrected_weights(correction)):
        return materials.store.read_bytes(keys.corrected_weights(correction))
    raise InvalidInput(
        f"version {materials.correction.base_version} of {names.last(materials.model.name)!r} has no torch weights "
        "here; upload a safetensors file of its state dict (--weights)",
        reason="NO_WEIGHTS",
    )


def _check_same(network: TorchModule, materials: Materials) -> None:
    inputs = real_inputs(materials, materials.model.fixed_batch_size or _COMPARED)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(inputs)).numpy()
    difference, bound = largest_difference(materials.deployed_file, inputs, outputs)
    if not difference <= bound:
        raise InvalidInput(
            f"what {materials.correction.config.torch_factory.function} builds differs by {difference:.3g} from "
            f"version {materials.correction.base_version}, as it is served, on real images; bring its very weights, "
            "and leave preprocessing where the model declares it",
            reason="FACTORY_MISMATCH",
        )
