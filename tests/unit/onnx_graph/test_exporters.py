"""Graphs of torch's two exporters: run as in onnxruntime, trained as in torch, written back unchanged."""

import copy
import functools
import io
import warnings
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.onnx.errors import UnsupportedOperatorError

from services.onnx_graph.module import OnnxModule
from tests.unit.corrector.nets import CLASSES, images, network, served

# Of the opsets 13 to 20 those that the TorchScript exporter writes: all, but fused attention begins with 14. A ViT of
# opset 13 is one that is not fused.
SCRIPT = {
    "resnet": range(13, 21),
    "mobilenet": range(13, 21),
    "convnext": range(13, 21),
    "vit": range(14, 21),
    "unfused vit": range(13, 14),
    "normalising": range(13, 21),
}
# And those that the dynamo exporter writes. It builds opset 18 or later; asked for less, it converts its graph of
# opset 18 down, one opset at a time, and if a step fails it keeps opset 18 and does not say so in an error. The step
# to 17 fails for ReduceMean, which every pooled feature map holds; the step to 16 for LayerNormalization, new in 17.
DYNAMO = {
    "resnet": range(18, 21),
    "mobilenet": range(18, 21),
    "convnext": range(18, 21),
    "vit": range(17, 21),
    "normalising": range(18, 19),
}
# The requests at which a step fails, and the oldest; those between fail at the same step.
KEPT = [("resnet", 17), ("mobilenet", 17), ("convnext", 17), ("vit", 16), ("vit", 13)]

EXPORTS = [
    (net, dynamo, opset)
    for dynamo, delivered in ((False, SCRIPT), (True, DYNAMO))
    for net, opsets in delivered.items()
    for opset in opsets
]
each_export = pytest.mark.parametrize(
    ("net", "dynamo", "opset"),
    EXPORTS,
    ids=[f"{net}-{'dynamo' if dynamo else 'script'}-{opset}" for net, dynamo, opset in EXPORTS],
)


@functools.cache
def program(net: str) -> torch.export.ExportedProgram:
    """The program that the dynamo exporter makes of a network before it writes any opset."""
    return torch.export.export(network(net), (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@functools.cache
def exported(net: str, dynamo: bool, opset: int) -> bytes:
    options: dict[str, Any] = {"input_names": ["images"], "opset_version": opset, "dynamo": dynamo}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters warn of their own deprecations
        if dynamo:
            written: Any = torch.onnx.export(program(net), (), verbose=False, **options)
            return bytes(written.model_proto.SerializeToString())
        file = io.BytesIO()
        target: Any = file  # works, though only paths are declared
        torch.onnx.export(network(net), (images(2),), target, dynamic_axes={"images": {0: "batch"}}, **options)
    return file.getvalue()


def read(net: str, dynamo: bool, opset: int) -> onnx.ModelProto:
    return onnx.load_from_string(exported(net, dynamo, opset))


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its tensors by name: a conversion that fails has moved some to the end."""
    model.graph.initializer.sort(key=lambda tensor: tensor.name)
    model.graph.value_info.sort(key=lambda value: value.name)
    return model


def fused(model: nn.Module) -> nn.Module:
    """The exporters fold BatchNorm into the convolution before it; so does the reference."""
    for name, child in model.named_children():
        parts: list[Any] = list(child.children())
        if len(parts) == 3 and isinstance(parts[1], nn.BatchNorm2d):
            setattr(model, name, nn.Sequential(fuse_conv_bn_eval(parts[0], parts[1]), parts[2]))
        else:
            fused(child)
    return model


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % CLASSES)


def counterpart(weight: Tensor, module: OnnxModule) -> Tensor:
    """The gradient of the module's parameter that holds this weight, as it is or transposed."""
    for parameter in module.parameters():
        for turn in (torch.clone, torch.t) if parameter.ndim == 2 else (torch.clone,):
            value = turn(parameter.detach())
            if value.squeeze().shape == weight.squeeze().shape and torch.allclose(
                value.squeeze(), weight.squeeze(), atol=1e-5
            ):
                assert parameter.grad is not None
                return turn(parameter.grad).reshape(weight.shape)
    raise AssertionError(f"no parameter holds the weight of shape {tuple(weight.shape)}")


@each_export
def test_exporter_delivers_the_opset(net: str, dynamo: bool, opset: int) -> None:
    """The file is of the opset that was asked for."""
    assert [(entry.domain, entry.version) for entry in read(net, dynamo, opset).opset_import] == [("", opset)]


@pytest.mark.parametrize(("net", "opset"), KEPT)
def test_dynamo_exporter_keeps_opset_18_where_it_cannot_convert(net: str, opset: int) -> None:
    """A request for an older opset that it cannot fulfil gives, without an error, the model of opset 18."""
    assert in_order(read(net, dynamo=True, opset=opset)) == in_order(read(net, dynamo=True, opset=18))


def test_script_exporter_has_no_fused_attention_in_opset_13() -> None:
    """The exporter refuses the ViT with torch's attention; the needed opset is 14."""
    with pytest.raises(UnsupportedOperatorError, match=r"scaled_dot_product_attention.* added in version 14"):
        exported("vit", dynamo=False, opset=13)


@each_export
def test_outputs_equal_the_served_ones(net: str, dynamo: bool, opset: int) -> None:
    """For any batch size the module gives what onnxruntime serves, in train mode as in eval mode."""
    model = read(net, dynamo, opset)
    module = OnnxModule(model).train()
    for batch in (1, 2, 7):
        with torch.no_grad():
            torch.testing.assert_close(module(images(batch)), served(model, images(batch)), atol=1e-4, rtol=0)


@each_export
def test_parameters_are_the_weights(net: str, dynamo: bool, opset: int) -> None:
    """Exactly the network's weights are parameters; their gradients are torch's, to a thousandth of the largest."""
    module = OnnxModule(read(net, dynamo, opset))
    reference = fused(copy.deepcopy(network(net))).requires_grad_()
    torch.autograd.backward(loss(module, images(7)))
    torch.autograd.backward(loss(reference, images(7)))
    assert len(list(module.parameters())) == len(list(reference.parameters()))
    for weight in reference.parameters():
        assert weight.grad is not None
        tolerance = 1e-3 * min(1.0, weight.grad.abs().max().item())
        torch.testing.assert_close(counterpart(weight.detach(), module), weight.grad, atol=tolerance, rtol=0)


@each_export
def test_untrained_model_is_written_back_unchanged(net: str, dynamo: bool, opset: int) -> None:
    """Without training, to_onnx is the original, byte for byte."""
    model = read(net, dynamo, opset)
    model.metadata_props.add(key="owner", value="someone")
    assert OnnxModule(model).to_onnx().SerializeToString() == model.SerializeToString()


@each_export
def test_trained_model_is_served_as_trained(net: str, dynamo: bool, opset: int) -> None:
    """After a step of SGD onnxruntime serves the module's outputs, from the same graph, and they are new."""
    model = read(net, dynamo, opset)
    module, x = OnnxModule(model), images(7)
    torch.autograd.backward(loss(module, x))
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    written = module.to_onnx()
    before, after = served(model, x), served(written, x)
    torch.testing.assert_close(after, module(x).detach(), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-3
    for stripped in (written, model):
        for initializer in stripped.graph.initializer:
            initializer.ClearField("raw_data")
    assert written.graph.initializer == model.graph.initializer
