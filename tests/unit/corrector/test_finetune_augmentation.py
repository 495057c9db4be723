from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.corrector.finetune import DRAWS, Augmentation

Array = npt.NDArray[Any]
MIDDLE = np.full((1, DRAWS), 0.5)


def picture(height: int = 8, width: int = 8) -> Array:
    """Plant a bright pixel near the upper left corner."""
    image = np.zeros((1, 1, height, width), np.float32)
    image[0, 0, 1, 2] = 1
    return image


def draws(**named: float) -> Array:
    values = MIDDLE.copy()
    for name, value in named.items():
        values[0, ["right", "down", "turn", "flip"].index(name)] = value
    return values


def brightest(image: Array) -> tuple[int, int]:
    row, column = np.unravel_index(image[0, 0].argmax(), image.shape[2:])
    return int(row), int(column)


def test_nothing_is_done_unless_declared() -> None:
    """Without a declaration the very images come back, whatever is drawn."""
    image = picture()
    assert Augmentation()(image, np.zeros((1, DRAWS))) is image


@pytest.mark.parametrize(
    ("drawn", "place"), [({"right": 1.0}, (1, 4)), ({"right": 0.0}, (1, 0)), ({"down": 1.0}, (3, 2))]
)
def test_shifts(drawn: dict[str, float], place: tuple[int, int]) -> None:
    """The largest draw moves the image by the declared share of its side, right or down, the least one back."""
    moved = Augmentation(max_shift=0.25)(picture(), draws(**drawn))
    assert brightest(moved) == place
    np.testing.assert_allclose(moved.max(), 1, atol=1e-5)


def test_shifts_of_oblong_images() -> None:
    """A share is one of each side."""
    assert brightest(Augmentation(max_shift=0.25)(picture(8, 16), draws(right=1.0, down=1.0))) == (3, 6)


def test_flips() -> None:
    """Half of the draws mirror the image left to right."""
    flip = Augmentation(horizontal_flip=True)
    np.testing.assert_allclose(flip(picture(), draws(flip=0.4)), picture()[..., ::-1], atol=1e-6)
    np.testing.assert_allclose(flip(picture(), draws(flip=0.6)), picture(), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_rotations_keep_shapes(shape: tuple[int, int]) -> None:
    """A quarter turn of a square image turns it, and a half turn of an oblong one turns it around, undistorted."""
    degrees = 90.0 if shape[0] == shape[1] else 180.0
    turned = Augmentation(max_rotation_degrees=degrees)(picture(*shape), draws(turn=1.0))
    around = np.rot90(picture(*shape), k=int(degrees // 90), axes=(2, 3))
    other = np.rot90(picture(*shape), k=-int(degrees // 90), axes=(2, 3))
    assert np.abs(turned - around).max() < 1e-4 or np.abs(turned - other).max() < 1e-4


def test_each_image_has_its_own() -> None:
    """Draws are of images: one can move while the other stays."""
    both = Augmentation(max_shift=0.25)(
        np.concatenate([picture(), picture()]), np.concatenate([MIDDLE, draws(right=1.0)])
    )
    assert (brightest(both[:1]), brightest(both[1:])) == ((1, 2), (1, 4))
