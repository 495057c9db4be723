from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from services.onnx_graph.onnx_files import in_batches, onnx_function

Array = npt.NDArray[Any]


def test_a_file_as_a_function(onnx_classifier: Callable[..., bytes]) -> None:
    """A graph is a function of arrays: here the planted matrix product, for any batch size."""
    file = onnx_classifier()
    weight = numpy_helper.to_array(onnx.load_model_from_string(file).graph.initializer[0])
    run = onnx_function(file)
    for count in (1, 5):
        images = np.random.default_rng(0).random((count, 1, 8, 8), np.float32)
        [logits] = run(images)
        np.testing.assert_allclose(logits, images.reshape(count, 64) @ weight, rtol=1e-4, atol=1e-4)


def test_several_inputs_in_their_order(onnx_classifier: Callable[..., bytes]) -> None:
    """Inputs are given in the order of the graph; one too few is an error."""
    run = onnx_function(onnx_classifier(inputs=("a", "b")))
    zeros, ones = np.zeros((2, 1, 8, 8), np.float32), np.ones((2, 1, 8, 8), np.float32)
    np.testing.assert_allclose(run(ones, ones)[0], 2 * run(ones, zeros)[0], rtol=1e-5)
    with pytest.raises(ValueError, match="shorter"):
        run(zeros)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 50])
def test_in_batches(batch_size: int) -> None:
    """Batches are never larger than asked for, and the results are joined in order."""
    sizes = []

    def double(part: Array) -> Array:
        sizes.append(len(part))
        return part * 2

    np.testing.assert_array_equal(in_batches(double, np.arange(10), batch_size), np.arange(10) * 2)
    assert max(sizes) <= batch_size
    assert sum(sizes) == 10
