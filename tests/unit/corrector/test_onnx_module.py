"""Exported networks: run as onnxruntime runs them, trained as torch trains them, written back where they came from."""

import copy
import functools
import io
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from services.corrector.onnx_module import OnnxModule

CLASSES, SIZE = 5, 16


def unit(inputs: int, outputs: int, kernel: int, activation: nn.Module, **options: Any) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), activation)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            unit(inputs, outputs, 3, nn.ReLU(), stride=2), unit(outputs, outputs, 3, nn.Identity())
        )
        self.shortcut = unit(inputs, outputs, 1, nn.Identity(), stride=2)

    def forward(self, x: Any) -> Any:
        return F.relu(self.body(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Any) -> Any:
        return x * self.gate(x)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Any) -> Any:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Any) -> Any:
        batch, tokens, channels = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [batch, head, token, channel]
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, channels))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 17, 8))
        self.attention, self.mlp = Attention(8, 2), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [batch, patch, channel]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.attention(x)
        return self.head((x + self.mlp(x))[:, 0])


class Normalising(nn.Module):
    """Pixels in 0..1 are standardised inside the graph."""

    mean: Tensor
    sd: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("sd", torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Upsample(scale_factor=2), head(4))

    def forward(self, x: Any) -> Any:
        return self.body((x - self.mean) / self.sd)


NETS = {
    "cnn": lambda: nn.Sequential(unit(3, 8, 3, nn.ReLU()), nn.MaxPool2d(2), nn.Dropout(0.5), head(8)),
    "residual": lambda: nn.Sequential(unit(3, 8, 3, nn.ReLU()), Residual(8, 12), head(12)),
    "mobile": lambda: nn.Sequential(
        unit(3, 8, 3, nn.Hardswish(), stride=2), unit(8, 8, 5, nn.Hardswish(), groups=8), SqueezeExcite(8), head(8)
    ),
    "convnext": lambda: nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), ConvNeXtBlock(8), head(8)),
    "vit": ViT,
    "normalising": Normalising,
}
EXPORTS = [(net, dynamo) for net in NETS for dynamo in (False, True)]
each_export = pytest.mark.parametrize(
    ("net", "dynamo"), EXPORTS, ids=[f"{net}-{'dynamo' if dynamo else 'script'}" for net, dynamo in EXPORTS]
)


@functools.cache
def network(net: str) -> nn.Module:
    """Random everywhere: an exporter merges parameters that are equal, such as two biases of zeros."""
    random = torch.Generator().manual_seed(3)
    model = NETS[net]().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2, generator=random)
        elif tensor.is_floating_point() and name not in {"mean", "sd"}:
            tensor.data.normal_(0, 0.4, generator=random)
    return model


@functools.cache
def exported(net: str, *, dynamo: bool) -> bytes:
    file = io.BytesIO()
    target: Any = file  # works with both exporters, though only paths are declared
    axes = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
        if dynamo
        else {"dynamic_axes": {"images": {0: "batch"}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters warn of their own deprecations
        torch.onnx.export(network(net), (images(2),), target, input_names=["images"], dynamo=dynamo, **axes)
    return file.getvalue()


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


def served(model: onnx.ModelProto, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


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
def test_outputs_equal_the_served_ones(net: str, dynamo: bool) -> None:
    """For any batch size the module gives what onnxruntime serves, in train mode as in eval mode."""
    model = onnx.load_from_string(exported(net, dynamo=dynamo))
    module = OnnxModule(model).train()
    for batch in (1, 2, 7):
        with torch.no_grad():
            torch.testing.assert_close(module(images(batch)), served(model, images(batch)), atol=1e-4, rtol=1e-4)


@each_export
def test_parameters_are_the_weights(net: str, dynamo: bool) -> None:
    """Exactly the network's weights are parameters, and their gradients are torch's."""
    module = OnnxModule(onnx.load_from_string(exported(net, dynamo=dynamo)))
    reference = fused(copy.deepcopy(network(net))).requires_grad_()
    torch.autograd.backward(loss(module, images(7)))
    torch.autograd.backward(loss(reference, images(7)))
    assert len(list(module.parameters())) == len(list(reference.parameters()))
    for weight in reference.parameters():
        torch.testing.assert_close(counterpart(weight.detach(), module), weight.grad, atol=1e-3, rtol=1e-3)


@each_export
def test_untrained_model_is_written_back_unchanged(net: str, dynamo: bool) -> None:
    """Without training, to_onnx is the original, byte for byte."""
    model = onnx.load_from_string(exported(net, dynamo=dynamo))
    model.metadata_props.add(key="owner", value="someone")
    assert OnnxModule(model).to_onnx().SerializeToString() == model.SerializeToString()


@each_export
def test_trained_model_is_served_as_trained(net: str, dynamo: bool) -> None:
    """After a step of SGD onnxruntime serves the module's outputs, from the same graph, and they are new."""
    model = onnx.load_from_string(exported(net, dynamo=dynamo))
    module, x = OnnxModule(model), images(7)
    torch.autograd.backward(loss(module, x))
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    written = module.to_onnx()
    torch.testing.assert_close(served(written, x), module(x).detach(), atol=1e-4, rtol=1e-4)
    assert (served(written, x) - served(model, x)).abs().max() > 1e-3
    for stripped in (written, model):
        for initializer in stripped.graph.initializer:
            initializer.ClearField("raw_data")
    assert written.graph.initializer == model.graph.initializer


def graph(
    body: str, *, inputs: str = "float[N,3] x", header: str = 'ir_version: 8, opset_import: ["" : 17]'
) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"<{header}> g ({inputs}) => (float[] y) {body}")


def trained(model: onnx.ModelProto) -> set[str]:
    return {name for name, _ in OnnxModule(model).named_parameters()}


def test_constant_nodes_are_weights_too() -> None:
    """A weight in a Constant node is trained and written back into the node."""
    model = graph("{ w = Constant<value = float[3,2] {1,2,3,4,5,6}>() y = MatMul(x, w) }")
    module = OnnxModule(model)
    module.get_parameter("w").data.add_(1)
    x = torch.ones(4, 3)
    torch.testing.assert_close(served(module.to_onnx(), x), module(x).detach())
    assert served(module.to_onnx(), x)[0].tolist() == [12, 15]


LEARNABLE = {
    "normalisation": (
        """<float[3] m = {1,2,3}, float[3] s = {1,2,3}, float[3] b = {1,2,3}>
        { a = Sub(x, m) c = Div(a, s) d = Relu(c) y = Add(d, b) }""",
        {"b"},
    ),
    "statistics": (
        """<float[3] s = {1,2,3}, float[3] b = {1,2,3}, float[3] m = {1,2,3}, float[3] v = {1,2,3}>
        { y = BatchNormalization(x, s, b, m, v) }""",
        {"s", "b"},
    ),
    "single numbers": (
        """<float[1] s = {0.5}, float[1] b = {0.5}, float[1] t = {0.5}, float[3,1] w = {1,2,3}>
        { a = Gemm(x, w, b) c = PRelu(a, s) y = Mul(c, t) }""",
        {"s", "b", "w"},
    ),
    "attention mask": (
        """<float[3] m = {0,-100,0}, float[3] b = {0,-1,0}>
        { a = Relu(x) c = Add(a, b) d = Add(c, m) y = Softmax(d) }""",
        {"b"},
    ),
    "through views": (
        """<float[3,3] w = {1,2,3,4,5,6,7,8,9}, float[3] k = {1,1,1}>
        { t = Transpose(w) i = Identity(t) a = MatMul(x, i) s = Shape(i) e = Expand(k, s) y = Mul(a, e) }""",
        {"w", "k"},
    ),
    "normalisation without affine map": (
        """<float[3] s = {1,1,1}, float[3] b = {0,0,0}, float[3,3,1] w = {1,2,3,4,5,6,7,8,9}>
        { a = Unsqueeze<axes = [2]>(x) c = Conv(a, w) y = InstanceNormalization(c, s, b) }""",
        {"w"},
    ),
    "shape arithmetic": (
        """<float[2] k = {1,2}>
        { s = Shape(x) f = Cast<to = 1>(s) g = Mul(f, k) h = Cast<to = 7>(g) a = Relu(x) y = Expand(a, h) }""",
        set[str](),
    ),
}


@pytest.mark.parametrize(("body", "weights"), LEARNABLE.values(), ids=LEARNABLE.keys())
def test_only_weights_are_trained(body: str, weights: set[str]) -> None:
    """What normalises the image, bounds, masks, counts or measures is held fixed; so is a lone number in arithmetic."""
    assert trained(graph(body)) == weights


def test_names_are_made_fit_for_torch() -> None:
    """Names that torch refuses or the module already uses are changed, and found again on the way back."""
    model = graph("<float[3] a = {1,2,3}, float[3] b = {1,2,3}> { c = Relu(x) d = Mul(c, a) y = Add(d, b) }")
    model.graph.initializer[0].name = model.graph.node[1].input[1] = "/layer.1/w:0"
    model.graph.initializer[1].name = model.graph.node[2].input[1] = "training"
    module = OnnxModule(model)
    assert {name for name, _ in module.named_parameters()} == {"_layer_1_w_0", "training_"}
    module.get_parameter("training_").data.zero_()
    assert onnx.numpy_helper.to_array(module.to_onnx().graph.initializer[1]).tolist() == [0, 0, 0]


def test_local_functions_are_inlined_to_run_and_kept_when_written() -> None:
    """A graph of local functions is trained through them and keeps them."""
    model = graph(
        "<float[3,2] w = {1,2,3,4,5,6}> { y = own.dense(x, w) }\n"
        '<domain: "own", opset_import: ["" : 17]> dense (a, b) => (c) { d = MatMul(a, b) c = Relu(d) }',
        header='ir_version: 8, opset_import: ["" : 17, "own" : 1]',
    )
    assert trained(model) == {"w"}
    assert OnnxModule(model).to_onnx() == model


def test_a_second_output_is_not_run() -> None:
    """Only what the first output needs must be runnable."""
    model = graph("{ y = Relu(x) z = Frobnicate(x) }")
    model.graph.output.add(name="z")
    assert OnnxModule(model)(torch.tensor([[-1.0, 2.0]])).tolist() == [[0, 2]]


def test_half_precision_weights_keep_their_type() -> None:
    """bfloat16 and float16 initializers are trained and written back in their type."""
    for dtype in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
        model = graph("{ a = Relu(x) y = Mul(a, w) }", inputs="float[N,3] x")
        model.graph.initializer.append(onnx.helper.make_tensor("w", dtype, [3], np.array([1.0, 2.0, 3.0])))
        module = OnnxModule(model)
        module.get_parameter("w").data.mul_(2)
        assert onnx.numpy_helper.to_array(module.to_onnx().graph.initializer[0]).astype(float).tolist() == [2, 4, 6]


def test_several_inputs_are_refused() -> None:
    """An image classifier has one input; the error names those found."""
    with pytest.raises(ValueError, match=r"\['x', 'z'\].*exactly one"):
        OnnxModule(graph("{ y = Add(x, z) }", inputs="float[3] x, float[3] z"))


def test_missing_external_data_is_refused() -> None:
    """Weights outside the file must have been loaded; the error names the tensor and the remedy."""
    model = graph("<float[3] w = {1,2,3}> { y = Mul(x, w) }")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(ValueError, match=r"'w'.*outside the model file.*onnx\.load"):
        OnnxModule(model)


def test_module_survives_copying_and_its_state_dict() -> None:
    """A copy and a reloaded state compute the same; training the copy leaves the original alone."""
    module = OnnxModule(onnx.load_from_string(exported("cnn", dynamo=False)))
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data.add_(0.1)
    assert not torch.allclose(twin(images(2)), module(images(2)))
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(images(2)), module(images(2)))
