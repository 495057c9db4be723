import numpy as np
import pytest
from defuse import tensors
from defuse.errors import InvalidInput
from defuse.v1 import tensor_pb2


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (1, 8, 8, 3), (0, 8, 8, 3)])
def test_images_round_trip(shape: tuple[int, ...]) -> None:
    """Images are unchanged by the conversion and back."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    message = tensors.images_to_proto(images)
    assert len(message.data) == images.size
    np.testing.assert_array_equal(tensors.images_from_proto(message), images, strict=True)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 4)])
def test_floats_round_trip(shape: tuple[int, ...]) -> None:
    """Real numbers of any shape come back as float32."""
    values = np.random.default_rng(0).standard_normal(shape)
    decoded = tensors.floats_from_proto(tensors.floats_to_proto(np.asarray(values)))
    np.testing.assert_array_equal(decoded, np.asarray(values, np.float32), strict=True)


def test_memory_order() -> None:
    """Transposed and sliced arrays are sent row-major, little-endian."""
    values = np.arange(6, dtype=">f8").reshape(2, 3).T
    message = tensors.floats_to_proto(values)
    assert message.data == np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()
    images = np.arange(24, dtype=np.uint8).reshape(1, 4, 3, 2)[:, ::2].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(tensors.images_from_proto(tensors.images_to_proto(images)), images)


def test_no_images() -> None:
    """An empty message has no images."""
    assert len(tensors.images_from_proto(tensor_pb2.ImageTensor())) == 0


def test_decoded_floats_are_writable() -> None:
    decoded = tensors.floats_from_proto(tensors.floats_to_proto(np.zeros(3)))
    decoded[0] = 1.0
    assert decoded[0] == 1.0


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 2, 2, 1), 3), ((1, 2, 2, 1), 5), ((2, 2), 4), ((-2, -2, 1, 1), 4), ((-1, 2, 2, 1), 4)]
)
def test_invalid_images(shape: tuple[int, ...], size: int) -> None:
    """The error has the size of the message."""
    with pytest.raises(InvalidInput, match=f"holds {size}"):
        tensors.images_from_proto(tensor_pb2.ImageTensor(shape=shape, data=bytes(size)))


@pytest.mark.parametrize(("shape", "size"), [((3,), 11), ((3,), 16), ((-2, -2), 16), ((-3,), 12)])
def test_invalid_floats(shape: tuple[int, ...], size: int) -> None:
    """The error has the size of the message."""
    with pytest.raises(InvalidInput, match=f"holds {size}"):
        tensors.floats_from_proto(tensor_pb2.FloatTensor(shape=shape, data=bytes(size)))
