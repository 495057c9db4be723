from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from services.generator.preflight import (
    CONFIDENCE,
    PreflightRefused,
    SourceMargins,
    check_accuracy,
    check_reconstructions,
    measure_margins,
)
from services.generator.search import MARGIN_EPSILON
from tests.unit.generator.world import DIM, Array, models

# Dark pixels are read as class 0, bright ones as class 2; class 1 comes next to 0 up to half grey, and to 2 beyond.
LABELS = np.array([0, 2, 0, 0, 2, 0])
PIXELS = np.array([20, 230, 40, 200, 240, 30], np.uint8)
RECONSTRUCTED = np.array([0.1, 0.9, 0.8, 0.1, 0.6, 0.4], np.float32)


def by_brightness(images: Array) -> Array:
    x0 = images.reshape(len(images), DIM)[:, 0]
    return np.stack([1 - x0, np.full_like(x0, 0.45), x0], axis=1)


def examined(batch_size: int = 4, labels: Array = LABELS, check: Callable[[], None] = lambda: None) -> SourceMargins:
    images = np.repeat(PIXELS[: len(labels), None, None, None], DIM, axis=3).reshape(-1, 1, DIM, 1)
    mu = np.repeat(RECONSTRUCTED[: len(labels), None], DIM, axis=1)
    flat = models(by_brightness, decode=lambda z: z.reshape(len(z), 1, 1, DIM))
    return measure_margins(images, labels, mu, flat, batch_size=batch_size, check=check)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_images_and_reconstructions_are_read(batch_size: int) -> None:
    """Each source has the margin of its image, that of its reconstruction, and who comes next to its label there."""
    read = examined(batch_size)
    image, z = PIXELS / 255, RECONSTRUCTED
    for found, x in ((read.image_margin, image), (read.reconstruction_margin, z)):
        own, other = np.where(LABELS == 0, 1 - x, x), np.where(LABELS == 0, x, 1 - x)
        np.testing.assert_allclose(found, own - np.maximum(other, 0.45), rtol=1e-5)
    assert read.runner_up.tolist() == [1, 1, 2, 1, 1, 1]


def test_what_is_read_wrong_is_not_searched() -> None:
    """Searchable is what is read correctly as an image and as a reconstruction."""
    read = examined()
    assert read.right_on_image.tolist() == [True, True, True, False, True, True]
    assert read.searchable.tolist() == [True, True, False, False, True, True]


def test_an_answer_within_rounding_is_not_right() -> None:
    """A margin within the epsilon is neither a correct answer nor worth searching around."""
    margin = np.array([0.5, 2.0]) * MARGIN_EPSILON
    sure = np.ones(2)
    runner_up = np.zeros(2, int)
    on_image = SourceMargins(image_margin=margin, reconstruction_margin=sure, runner_up=runner_up)
    decoded = SourceMargins(image_margin=sure, reconstruction_margin=margin, runner_up=runner_up)
    for read in (on_image, decoded):
        assert read.searchable.tolist() == [False, True]
    assert on_image.right_on_image.tolist() == [False, True]


def test_no_sources() -> None:
    """No images are examined without a question, in the types that are stored."""
    read, some = examined(labels=LABELS[:0]), examined()
    for name, array in some.arrays().items():
        assert read.arrays()[name].shape == (0,), name
        assert read.arrays()[name].dtype == array.dtype, name
    assert some.runner_up.dtype.kind == "i"  # a class id, that tables are asked by


def test_examination_can_be_stopped() -> None:
    """An exception of `check` before a batch ends the preflight."""
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examined(batch_size=1, check=stop)


def test_a_contradicted_accuracy_is_refused_with_its_figures() -> None:
    """A classifier that reads far fewer images than declared is refused as a preprocessing that does not match."""
    with pytest.raises(
        PreflightRefused, match=r"reads 20 of 200 .*\(0.100\), where 0.97 is declared.*range, mean, std"
    ) as caught:
        check_accuracy(20, 200, declared=0.97)
    assert caught.value.reason == "PREPROCESSING_MISMATCH"


def test_a_coarse_vae_is_refused_with_its_figures() -> None:
    """More images lost as reconstructions than allowed refuse the VAE, with the settings that mend it."""
    message = r"of 200 images .* misreads 60 \(0.300\).*where 0.1 is allowed.*vae.epochs, vae.latent_dim"
    with pytest.raises(PreflightRefused, match=message) as caught:
        check_reconstructions(140, 200, allowed_loss=0.1)
    assert caught.value.reason == "VAE_TOO_COARSE"


@pytest.mark.parametrize(("right", "images"), [(8, 10), (0, 1), (0, 0), (85, 100), (200, 200)])
def test_what_chance_explains_is_not_refused(right: int, images: int) -> None:
    """A small sample below the declared accuracy, or beyond the allowed loss, is no contradiction."""
    check_accuracy(right, images, declared=0.9)
    check_reconstructions(right, images, allowed_loss=0.1)


def refuses(call: Callable[..., None], *figures: int, **bound: float) -> bool:
    try:
        call(*figures, **bound)
    except PreflightRefused:
        return True
    return False


@given(images=st.integers(1, 300), share=st.floats(0, 1), declared=st.floats(0.01, 0.99))
def test_refused_is_what_has_less_than_five_percent(images: int, share: float, declared: float) -> None:
    """A run is refused where a classifier as good as declared would read so few images in less than 5 % of cases.

    The same is so of a VAE that loses as many as allowed.
    """
    right = round(share * images)
    chance = binom.cdf(right, images, declared)
    if abs(chance - (1 - CONFIDENCE)) > 1e-6:
        assert refuses(check_accuracy, right, images, declared=declared) == (chance < 1 - CONFIDENCE)
        assert refuses(check_reconstructions, right, images, allowed_loss=1 - declared) == (chance < 1 - CONFIDENCE)


@pytest.mark.parametrize(("right", "images"), [(0, 1000), (1000, 1000)])
def test_bounds_that_nothing_contradicts(right: int, images: int) -> None:
    """A declared accuracy of 0 and an allowed loss of 1 switch the preflight off."""
    check_accuracy(right, images, declared=0.0)
    check_reconstructions(right, images, allowed_loss=1.0)
