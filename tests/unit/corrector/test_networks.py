"""Torch factories: the module is checked, exported under the served names, and stays in inference mode."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2
from torch import nn

from services.corrector.networks import TorchModule, build_from_factory


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def model(**fields: Any) -> model_pb2.Model:
    declared = {"layout": "LAYOUT_NCHW", "low": 0, "high": 1}
    return model_pb2.Model(
        name="models/tiny",
        classes=["a", "b", "c"],
        image_shape=[8, 8, 1],
        input_name="pixels",
        input_datatype="FP32",
        output_name="scores",
        max_batch_size=16,
        preprocessing=declared,
        **fields,
    )


def weights(module: nn.Module) -> bytes:
    return safetensors.torch.save({name: value.clone() for name, value in module.state_dict().items()})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a module `acme_nets` with these functions."""

    def install(**functions: Any) -> None:
        module = ModuleType("acme_nets")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, "acme_nets", module)

    return install


def test_a_factory_is_called_and_its_weights_are_loaded(plugin: Callable[..., None]) -> None:
    """The module computes what the one with the uploaded weights computes."""
    plugin(build=lambda: nn.Sequential(*network()))
    trained = network()
    nn.init.ones_(trained[5].weight)  # type: ignore[index, arg-type]  # a Sequential
    built = build_from_factory("acme_nets:build", ["acme_nets"], lambda: weights(trained))
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(built.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("fixed", [0, 5])
def test_the_export_has_the_served_signature(fixed: int) -> None:
    """Names are the deployed ones; any batch size, or the model's own; the export computes the module."""
    module = TorchModule(network(), model(fixed_batch_size=fixed))
    file = module.to_onnx()
    session = onnxruntime.InferenceSession(file.SerializeToString())
    assert [entry.name for entry in session.get_inputs()] == ["pixels"]
    assert [entry.name for entry in session.get_outputs()] == ["scores"]
    assert (file.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 0) == fixed
    for batch in [fixed] if fixed else [1, 2, 7]:
        x = torch.rand(batch, 1, 8, 8)
        with torch.no_grad():
            expected = module(x)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0]), expected)


def test_it_stays_in_inference_mode() -> None:
    """Training moves weights, never the statistics of BatchNorm, and nothing is dropped out."""
    module = TorchModule(network(), model()).train()
    x = torch.rand(4, 1, 8, 8)
    before = {name: value.clone() for name, value in module.named_buffers()}
    torch.testing.assert_close(module(x), module(x))
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, before[name])


def test_the_last_layer_is_the_last_matrix() -> None:
    """Only weight and bias of the last module with a matrix are of the last layer."""
    assert TorchModule(network(), model()).last_layer == {"module.5.weight", "module.5.bias"}


def test_weights_are_a_state_dict_that_the_factory_takes(plugin: Callable[..., None]) -> None:
    """A correction's weights are the start of the next one."""
    plugin(build=network)
    module = TorchModule(network(), model())
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1)
    again = TorchModule(build_from_factory("acme_nets:build", ["acme_nets:build"], module.weights), model())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(again(x), module(x))


REFUSED = {
    "no function": ("acme_nets", ["acme_nets"], r"not of the form module:function"),
    "not allowed": ("acme_nets:build", ["other"], r"'acme_nets:build' is not allowed.*DEFUSE_TORCH_FACTORIES"),
    "another function": ("acme_nets:build", ["acme_nets:other"], r"is not allowed"),
    "no module": ("acme_gone:build", ["acme_gone"], r"cannot be imported.*acme_gone"),
    "no such function": ("acme_nets:gone", ["acme_nets"], r"cannot be imported.*gone"),
    "no callable": ("acme_nets:number", ["acme_nets"], r"is no function but int"),
    "no network": ("acme_nets:nothing", ["acme_nets"], r"returned NoneType"),
    "other names": ("acme_nets:renamed", ["acme_nets"], r"missing \['head.weight'.*unknown"),
    "other shapes": ("acme_nets:wider", ["acme_nets"], r"size mismatch"),
}


@pytest.mark.parametrize(("function", "allowed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(
    plugin: Callable[..., None], function: str, allowed: list[str], message: str
) -> None:
    """The error says what is wrong with factory or weights, and nothing runs that the operator has not allowed."""
    plugin(
        build=network,
        number=3,
        nothing=lambda: None,
        renamed=lambda: nn.ModuleDict({"head": nn.Linear(2, 3)}),
        wider=lambda: nn.Sequential(nn.Conv2d(1, 5, 3), *list(network())[1:]),
    )
    with pytest.raises(InvalidInput, match=message):
        build_from_factory(function, allowed, lambda: weights(network()))


def test_weights_that_are_no_safetensors_are_refused(plugin: Callable[..., None]) -> None:
    """A pickle is never read."""
    plugin(build=network)
    with pytest.raises(InvalidInput, match="safetensors"):
        build_from_factory("acme_nets:build", ["acme_nets"], lambda: b"\x80\x04}q\x00.")


def test_the_exported_file_is_a_valid_model() -> None:
    """ONNX's own checker accepts it."""
    onnx.checker.check_model(TorchModule(network(), model()).to_onnx())
