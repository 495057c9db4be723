"""Which constants of a graph are trained, how they are held and written back, and which models are refused."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from services.onnx_graph.module import OnnxModule
from tests.unit.corrector.nets import served


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
    """Constants that normalise the image, bound, mask, count or measure stay fixed; so do lone arithmetic numbers."""
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
    module, x = OnnxModule(graph(*LEARNABLE["single numbers"][:1])), torch.ones(2, 3)
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data.add_(0.1)
    assert not torch.allclose(twin(x), module(x))
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(x), module(x))


LAST_LAYERS = {
    "gemm": (
        """<float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}, float[3,3] v = {1,2,3,4,5,6,7,8,9}>
        { a = MatMul(x, v) c = Relu(a) y = Gemm(c, w, b) }""",
        {"w", "b"},
    ),
    "product, then bias and softmax": (
        """<float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}, float[3] k = {1,2,3}>
        { r = Relu(x) s = Mul(r, k) a = MatMul(s, w) c = Add(b, a) y = Softmax(c) }""",
        {"w", "b"},
    ),
    "transposed weights": (
        """<float[2,3] w = {1,2,3,4,5,6}> { a = Relu(x) t = Transpose(w) y = MatMul(a, t) }""",
        {"w"},
    ),
    "two paths to the output": (
        """<float[3,2] w = {1,2,3,4,5,6}, float[3,2] v = {1,2,3,4,5,6}>
        { a = Relu(x) b = MatMul(a, w) c = MatMul(a, v) y = Add(b, c) }""",
        set[str](),
    ),
    "no weights": ("{ a = Relu(x) y = Neg(a) }", set[str]()),
}


@pytest.mark.parametrize(("body", "names"), LAST_LAYERS.values(), ids=LAST_LAYERS.keys())
def test_the_last_layer(body: str, names: set[str]) -> None:
    """It is the last product of weights with features, with what is added after it; where paths meet there is none."""
    assert OnnxModule(graph(body)).last_layer == names
