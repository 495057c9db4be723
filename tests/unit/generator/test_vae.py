from typing import Any

import numpy as np
import pytest
import torch

from services.generator.vae import VaeConfig, check_images, new_vae, to_tensor
from tests.unit.generator.bars import bars, config_for

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 17, 33), (1, 9, 128), (3, 128, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_goes_in_and_comes_out(shape: tuple[int, int, int]) -> None:
    """Odd, flat and large images of one or three channels keep their shape, and [0, 1]."""
    vae = new_vae(config_for(shape), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        mu, sigma = vae.encode(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
        images = vae.decode(mu + 50 * sigma)
    assert mu.shape == sigma.shape == (2, 4)
    assert (sigma > 0).all()
    assert images.shape == (2, *shape)
    assert images.min() >= 0
    assert images.max() <= 1


def test_new_weights_are_drawn_by_seed() -> None:
    """Same seed, same weights; the global generator, which belongs to others, is left alone."""
    before = torch.get_rng_state()
    first, second, other = (
        new_vae(config_for(), torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shape": (2, 28, 28)}, "1 or 3 channels"),
        ({"shape": (1, 7, 28)}, "8..512"),
        ({"shape": (1, 28, 513)}, "8..512"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"width": 20}, "width is 20"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 1.0}, "learning_rate is 1.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"max_shift": -1}, "max_shift is -1"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson': choose one of bernoulli, gaussian"),
    ],
)
def test_bad_configurations_name_the_value(overrides: dict[str, Any], message: str) -> None:
    """A value out of range is refused where the config is made, by name and value."""
    with pytest.raises(ValueError, match=message):
        config_for(**overrides)


@pytest.mark.parametrize("count", [0, -1])
def test_a_vae_needs_images(count: int) -> None:
    """Without training images there is no schedule."""
    with pytest.raises(ValueError, match=f"n_images is {count}"):
        VaeConfig.for_shape((1, 28, 28), count)


@pytest.mark.parametrize("channels", [1, 3])
def test_larger_sets_train_for_fewer_epochs(channels: int) -> None:
    """The default schedule follows the size of the data."""
    epochs = [VaeConfig.for_shape((channels, 28, 28), n).epochs for n in (1, 8000, 50_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[1] > epochs[2]


def test_colour_has_defaults_of_its_own() -> None:
    """A colour image is more than a gray one: more dimensions, more steps, each image by its own error, moved about."""
    gray, colour = (VaeConfig.for_shape((channels, 32, 32), 10_000) for channels in (1, 3))
    assert (gray.latent_dim, gray.beta, gray.likelihood, gray.max_shift) == (32, 0.2, "bernoulli", 0)
    assert (colour.latent_dim, colour.beta, colour.likelihood, colour.max_shift) == (128, 1.0, "gaussian", 1)
    assert colour.epochs > gray.epochs
    assert VaeConfig.for_shape((3, 8, 8), 10_000).latent_dim == 12
    assert VaeConfig.for_shape((3, 32, 32), 10_000, latent_dim=16).latent_dim == 16


@pytest.mark.parametrize(
    "images", [bars(4).astype(np.float32), bars(4)[:, :, :9], bars(4)[..., 0], bars(0)], ids=["type", "w", "rank", "n"]
)
def test_images_that_do_not_fit_are_refused(images: Any) -> None:
    """Images of another type, shape or number than the config says are a ValueError that says what to give."""
    check_images(bars(4), config_for())
    with pytest.raises(ValueError, match="give uint8"):
        check_images(images, config_for())


def test_stored_images_become_pixels_of_torch() -> None:
    """Bytes (n, h, w, c) become floats (n, c, h, w) in [0, 1], also where they must not be written."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    images.flags.writeable = False
    np.testing.assert_allclose(to_tensor(images, "cpu").numpy(), images.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
