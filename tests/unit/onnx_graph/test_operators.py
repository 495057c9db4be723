"""Each operator against ONNX's own node tests, and the meanings of older opsets against onnxruntime."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from services.onnx_graph.module import OnnxModule
from services.onnx_graph.operators import OPERATORS, UnsupportedOperator

# Node tests of operators in the table that are outside its scope, and why. Everything else must agree.
OUT_OF_SCOPE = {
    r"select_last_index": "no exporter writes it for a classifier; refused at construction",
    r"averagepool_\dd_dilations": "torch pools without dilation; refused at construction unless all are 1",
    r"batchnorm_.*training_mode": "the deployed model is corrected in inference mode; refused at construction",
    r"training_dropout": "random by definition; here Dropout is the identity",
    r"resize_.*(cubic|tf_crop|antialias|not_larger|not_smaller|half_pixel_symmetric)": "refused at construction",
    r"resize_downsample_scales_linear_align_corners$": "expects a fractional output length; onnxruntime disagrees too",
    r"attention_.*(past|softcap|qk_matmul|cache|nonpad|present|padded_kv|window)": "caches and windows; refused",
    r"reduce_(max|min)_empty_set": "torch has no maximum of nothing",
    r"maxpool_with_argmax_2d_precomputed_strides": "storage_order concerns only the indices, which are not computed",
}
DTYPES = {np.dtype(name) for name in ("float32", "float64", "int32", "int64", "bool")}


@pytest.fixture(scope="module")
def node_tests() -> dict[str, list[Any]]:
    """op_type -> ONNX's test cases of one node. ONNX computes them with numpy when it is imported: some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases include casts that overflow on purpose
        from onnx.backend.test.case.node import collect_testcases

        cases: list[Any] = collect_testcases(None)
    by_operator = defaultdict(list)
    for case in cases:
        if len(case.model.graph.node) == 1 and case.data_sets and _in_scope(case):
            by_operator[case.model.graph.node[0].op_type].append(case)
    return by_operator


def _arrays(values: Iterable[Any]) -> list[Any]:
    """ONNX gives most values as arrays and those of Cast as tensors."""
    return [numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value for value in values]


def _in_scope(case: Any) -> bool:
    inputs, outputs = map(_arrays, case.data_sets[0])
    plain = all(isinstance(value, np.ndarray | np.generic) and value.dtype in DTYPES for value in [*inputs, *outputs])
    return plain and bool(inputs) and not any(re.search(pattern, case.name) for pattern in OUT_OF_SCOPE)


def _as_module(case: Any, output: int) -> OnnxModule:
    """The case's first input stays an input, the others become initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value, data in list(zip(model.graph.input, case.data_sets[0][0], strict=True))[1:]:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(*_arrays([data])), value.name))
    kept = model.graph.output[output]
    del model.graph.output[:]
    model.graph.output.append(kept)
    model.opset_import[0].version = max(model.opset_import[0].version, 7)  # the tests of Not say 1
    return OnnxModule(model)


@pytest.mark.parametrize("op_type", sorted(OPERATORS))
def test_operator_agrees_with_the_specification(op_type: str, node_tests: dict[str, list[Any]]) -> None:
    """Every operator of the table computes what ONNX's node tests expect, in shape, type and value."""
    cases = node_tests[op_type]
    assert cases, f"ONNX has no test of {op_type}"
    for case in cases:
        inputs, outputs = map(_arrays, case.data_sets[0])
        for position, expected in enumerate(outputs if OPERATORS[op_type].several else outputs[:1]):
            with torch.no_grad():
                got = _as_module(case, position)(torch.from_numpy(np.array(inputs[0]))).numpy()
            assert got.dtype == np.asarray(expected).dtype, case.name
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5, err_msg=case.name)


# opset, IR version, nodes; the input x is float[2,4,5,6]
OLDER = {
    "softmax over all later axes": (12, "y = Softmax<axis = 1>(x)"),
    "log-softmax over all later axes": (11, "y = LogSoftmax<axis = 2>(x)"),
    "clip by attributes": (10, "y = Clip<min = -0.3, max = 0.4>(x)"),
    "pad by attributes": (10, 'y = Pad<mode = "reflect", pads = [0,0,1,2,0,0,3,0]>(x)'),
    "pad by attributes, constant": (10, "y = Pad<pads = [0,0,1,-2,0,0,3,0], value = 1.5>(x)"),
    "slice by attributes": (9, "y = Slice<starts = [1,-3], ends = [9,-1], axes = [1,3]>(x)"),
    "squeeze and unsqueeze by attributes": (12, "a = Unsqueeze<axes = [0,-1]>(x) y = Squeeze<axes = [0]>(a)"),
    "split by attribute": (12, "y, b = Split<axis = 1, split = [1,3]>(x)"),
    "sum over attribute axes": (12, "y = ReduceSum<axes = [-1,1], keepdims = 0>(x)"),
    "mean over attribute axes": (17, "y = ReduceMean<axes = [2,3]>(x)"),
    "dropout with ratio": (11, "y = Dropout<ratio = 0.5>(x)"),
    "upsample by input": (9, 's = Constant<value = float[4] {1,1,2,3}>() y = Upsample<mode = "nearest">(x, s)'),
    "resize of opset 10": (10, 's = Constant<value = float[4] {1,1,2,0.5}>() y = Resize<mode = "linear">(x, s)'),
    "same padding, lower": (17, 'y = MaxPool<auto_pad = "SAME_LOWER", kernel_shape = [3,4], strides = [2,2]>(x)'),
    "ceil mode": (17, "y = MaxPool<ceil_mode = 1, kernel_shape = [2,3], strides = [2,4], pads = [0,1,1,0]>(x)"),
    "mean pool, pads counted": (
        17,
        (
            "y = AveragePool<ceil_mode = 1, count_include_pad = 1, kernel_shape = [3,3], strides = [2,2], "
            "pads = [1,1,0,1]>(x)"
        ),
    ),
    "uneven convolution": (
        17,
        (
            "s = Constant<value = int64[4] {6,2,3,2}>() v = Constant<value = float {0.3}>() w = Expand(v, s) "
            "y = Conv<group = 2, dilations = [1,2], pads = [2,0,1,3], strides = [2,1]>(x, w)"
        ),
    ),
    "transposed convolution, cropped": (
        17,
        (
            "s = Constant<value = int64[4] {4,3,3,3}>() v = Constant<value = float {0.3}>() w = Expand(v, s) "
            "y = ConvTranspose<strides = [2,2], output_shape = [10,12]>(x, w)"
        ),
    ),
    "transposed convolution, output padding": (
        17,
        (
            "s = Constant<value = int64[4] {4,1,3,3}>() v = Constant<value = float {0.3}>() w = Expand(v, s) "
            "y = ConvTranspose<group = 4, strides = [2,3], pads = [1,0,0,1], output_padding = [1,2]>(x, w)"
        ),
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_meaning_follows_the_opset(name: str) -> None:
    """Attributes of older opsets and uneven windows mean what they mean to onnxruntime."""
    opset, nodes = OLDER[name]
    model = onnx.parser.parse_model(
        f'<ir_version: 7, opset_import: ["" : {opset}]> g (float[2,4,5,6] x) => (float[] y) {{ {nodes} }}'
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})[0]
    with torch.no_grad():
        np.testing.assert_allclose(OnnxModule(model)(torch.from_numpy(x)).numpy(), expected, atol=1e-5)


REFUSED = {
    "y = Frobnicate(x)": r"Frobnicate \(node 'n', domain 'ai.onnx', opset 17\).* MatMul,",
    "y = com.acme.Relu(x)": r"Relu \(node 'n', domain 'com.acme'.*Supported",
    'y = Resize<mode = "cubic">(x, , x)': r"Resize \(node 'n'.*mode='cubic'.*nearest",
    "y, z = MaxPool<kernel_shape = [1,1]>(x) w = Add(y, z)": r"MaxPool \(node 'n'.*only the first output",
    "y = If<then_branch = t () => (float[] a) {a = Neg(x)}, else_branch = e () => (float[] b) {b = Abs(x)}>(x)": (
        r"If \(node 'n'.*control flow"
    ),
}


@pytest.mark.parametrize(("nodes", "message"), REFUSED.items())
def test_refusal_names_the_operator(nodes: str, message: str) -> None:
    """A node that cannot be run is refused at construction, by operator, node and domain."""
    output = "w" if "w =" in nodes else "y"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17, "com.acme" : 1]> g (float[1,1,2,2] x) => (float[] {output}) '
        f"{{ {nodes} }}"
    )
    model.graph.node[0].name = "n"
    with pytest.raises(UnsupportedOperator, match=message):
        OnnxModule(model)


def test_ancient_opsets_are_refused() -> None:
    """Before opset 7 operators broadcast by an attribute; the remedy is named."""
    model = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 6]> g (float[2] x) => (float[2] y) {y = Abs(x)}'
    )
    with pytest.raises(UnsupportedOperator, match=r"Abs .*version_converter"):
        OnnxModule(model)
