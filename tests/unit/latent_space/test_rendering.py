from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from services.arrays import as_floats
from services.latent_space.rendering import (
    NO_SOURCE,
    Perturbations,
    Renderer,
    Resize,
    SourceImages,
    limited_size,
    resize_weights,
)

Array = npt.NDArray[Any]
SHAPE = (3, 4, 5)
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((6, 60)).astype(np.float32)
# Ten images of a split, of which some are sources.
IMAGES = RANDOM.integers(0, 256, (10, 4, 5, 3)).astype(np.uint8)
SOURCES = SourceImages(row=np.array([1, 4, 7, 9]), mu=RANDOM.standard_normal((4, 6)).astype(np.float32), images=IMAGES)


def decode(z: Any) -> Array:
    """Decode latents by a map that is neither linear nor the identity."""
    return np.asarray(1 / (1 + np.exp(-np.asarray(z) @ WEIGHT)), np.float32).reshape(-1, *SHAPE)


def decode_to_tensors(z: Any) -> torch.Tensor:
    return torch.from_numpy(decode(z))


def test_a_residual_changes_the_source_image() -> None:
    """X' = clip(x + D(z) - D(mu)), image by image, whatever order and number of perturbations a source has."""
    source = np.array([7, 1, 7, 9, 1, 7])
    z = RANDOM.standard_normal((6, 6)).astype(np.float32)
    rendered = Renderer(decode=decode, sources=SOURCES)(z, source)
    for image, one, latent in zip(rendered, source, z, strict=True):
        mu = SOURCES.mu[SOURCES.row == one]
        expected = as_floats(IMAGES[one][None]) + decode(latent[None]) - decode(mu)
        np.testing.assert_allclose(image, np.clip(expected[0], 0, 1), atol=1e-6)
    assert rendered.min() == 0  # the clip was needed
    assert rendered.max() == 1


def test_without_a_step_the_image_is_the_source() -> None:
    """Nothing is lost to reconstruction."""
    rendered = Renderer(decode=decode, sources=SOURCES)(SOURCES.mu, SOURCES.row)
    np.testing.assert_allclose(rendered, as_floats(IMAGES[SOURCES.row]), atol=1e-6)


def test_without_sources_the_decoder_renders() -> None:
    """The published rendering needs no source."""
    z = RANDOM.standard_normal((3, 6)).astype(np.float32)
    np.testing.assert_array_equal(Renderer(decode=decode)(z, np.full(3, NO_SOURCE)), decode(z))


def test_images_have_the_type_of_the_decoder() -> None:
    """A decoder of tensors renders tensors, with the same values."""
    z, source = SOURCES.mu + 0.5, SOURCES.row
    rendered = Renderer(decode=decode_to_tensors, sources=SOURCES)(torch.from_numpy(z), source)
    assert isinstance(rendered, torch.Tensor)
    np.testing.assert_allclose(rendered.numpy(), Renderer(decode=decode, sources=SOURCES)(z, source), atol=1e-6)


@pytest.mark.parametrize(("given", "wanted"), [((12, 9), (30, 20)), ((40, 30), (16, 12)), ((7, 40), (21, 10))])
def test_a_resize_is_bilinear(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Enlargement and reduction are those of torch, which avoids aliasing as Pillow does."""
    images = torch.rand(2, 3, *given, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(images, wanted, mode="bilinear", antialias=True)
    torch.testing.assert_close(Resize(given, wanted)(images), expected, atol=1e-5, rtol=0)


def test_a_resize_keeps_flat_images() -> None:
    """Weights of each pixel sum to one, also at the edges."""
    for sizes in ((5, 13), (13, 5), (1, 4), (6, 6)):
        np.testing.assert_allclose(resize_weights(*sizes).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"), [((28, 28), (28, 28)), ((224, 224), (64, 64)), ((300, 150), (64, 32)), ((64, 500), (8, 64))]
)
def test_copies_keep_their_proportions(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert limited_size(*size, 64) == expected


def test_perturbations_keep_latents_and_sources_together() -> None:
    parts = [Perturbations(latent=np.full((2, 3), number), source=np.array([number, 10 + number])) for number in (1, 2)]
    joined = Perturbations.joined([Perturbations.none(3), *parts])
    assert joined.source.tolist() == [1, 11, 2, 12]
    few = joined.take(joined.source > 10)
    assert few.latent[:, 0].tolist() == [1, 2]
    assert len(few) == 2
