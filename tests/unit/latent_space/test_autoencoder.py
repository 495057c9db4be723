import numpy as np
import onnx
import pytest
from defuse.errors import NotFound
from defuse.v1 import run_pb2
from onnx import helper, numpy_helper

from services.latent_space.autoencoder import read_decoder
from services.storage import keys
from services.storage.artifacts import ArtifactStore

CONFIG = run_pb2.RunConfig(dataset="datasets/d1", vae={"epochs": 3})
WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def decoder_file() -> bytes:
    """Return latents (n, 4) times a matrix, as images (n, 1, 2, 3)."""
    nodes = [
        helper.make_node("MatMul", ["z", "weight"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["images"]),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 1, 2, 3])],
        [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(np.array([-1, 1, 2, 3]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("count", [1, 600])
def test_the_decoder_of_a_run(store: ArtifactStore, count: int) -> None:
    """Latents of any precision and number become images in [0, 1], in order; outside values are clipped."""
    store.write_bytes(keys.vae(CONFIG, "decoder.onnx"), decoder_file())
    z = np.random.default_rng(1).standard_normal((count, 4))
    images = read_decoder(store, CONFIG)(z)
    assert images.dtype == np.float32
    expected = np.clip((z @ WEIGHT).reshape(count, 1, 2, 3), 0, 1)
    np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_of_another_vae_is_not_taken(store: ArtifactStore) -> None:
    """A run whose VAE is not in the store gets no other run's."""
    store.write_bytes(keys.vae(CONFIG, "decoder.onnx"), decoder_file())
    with pytest.raises(NotFound, match=r"decoder\.onnx"):
        read_decoder(store, run_pb2.RunConfig(dataset="datasets/d1", vae={"epochs": 4}))
