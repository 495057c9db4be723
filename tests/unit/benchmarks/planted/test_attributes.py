"""Attributes order images by what they are named after."""

import numpy as np
import pytest

from benchmarks.planted import attributes
from benchmarks.planted.attributes import ATTRIBUTES, fitting_kinds
from tests.unit.benchmarks.planted.images import Array, noisy, photographs, stroke


def value_of(kind: str, image: Array) -> float:
    return float(ATTRIBUTES[kind](image[None])[0])


@pytest.mark.parametrize(
    ("kind", "less", "more"),
    [
        ("brightness", stroke(value=90), stroke(value=220)),
        ("contrast", stroke(value=90), stroke(value=220)),
        ("stroke_width", stroke(width=2), stroke(width=5)),
        ("slant", stroke(lean=-0.6), stroke(lean=0.6)),
        ("size", stroke(length=8), stroke(length=24)),
        ("sharpness", np.repeat(np.repeat(noisy()[::4, ::4], 4, 0), 4, 1), noisy()),
        ("background", stroke(), 255 - stroke()),
        ("colour_cast", noisy() // np.array([2, 1, 1], np.uint8), noisy() // np.array([1, 2, 2], np.uint8)),
    ],
)
def test_an_attribute_orders_images(kind: str, less: Array, more: Array) -> None:
    assert value_of(kind, less) < value_of(kind, more)


@pytest.mark.parametrize("kind", ["stroke_width", "slant", "size"])
def test_the_shape_does_not_depend_on_the_ink(kind: str) -> None:
    faint, strong = (stroke(width=3, lean=0.3, value=value) for value in (100, 250))
    assert value_of(kind, faint) == pytest.approx(value_of(kind, strong), rel=1e-3)


def test_the_stroke_width_is_about_that_in_pixels() -> None:
    assert value_of("stroke_width", stroke(width=4, length=28)) == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("kind", sorted(ATTRIBUTES))
def test_a_blank_image_has_finite_attributes(kind: str) -> None:
    assert np.isfinite(value_of(kind, np.zeros((32, 32, 3), np.uint8)))


def test_digits_have_shapes_and_photographs_have_colours() -> None:
    digits = np.stack([stroke(width=width) for width in (1, 2, 3)])
    assert {"slant", "stroke_width"} <= set(fitting_kinds(digits))
    assert not {"colour_cast", "background"} & set(fitting_kinds(digits))
    photos = photographs().images["train"]
    assert {"colour_cast", "background"} <= set(fitting_kinds(photos))
    assert not {"slant", "stroke_width"} & set(fitting_kinds(photos))
    gray = np.repeat(photos.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    assert "colour_cast" not in fitting_kinds(gray)


def test_every_attribute_has_a_name() -> None:
    assert all(getattr(attributes, kind) is function for kind, function in ATTRIBUTES.items())
