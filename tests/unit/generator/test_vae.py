from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch

from services.generator import vae as subject
from services.generator import vae_files

Trained = tuple[subject.Vae, list[subject.EpochReport]]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 17, 33), (1, 9, 128), (3, 128, 64)]


def config_for(shape: tuple[int, int, int] = (1, 12, 10), **overrides: Any) -> subject.VaeConfig:
    small: dict[str, Any] = {"latent_dim": 4, "width": 16, "epochs": 3, "batch_size": 32}
    return subject.VaeConfig.for_shape(shape, 3000, **small | overrides)


def fresh(shape: tuple[int, int, int], seed: int = 0) -> subject.Vae:
    return subject.new_vae(config_for(shape), torch.Generator().manual_seed(seed)).eval()


def bars(n: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Plant two factors: the height and the brightness of a bar; uint8 images (n, 12, 10, 1)."""
    random = np.random.default_rng(seed)
    top, brightness = random.integers(0, 9, n), random.uniform(80, 255, n)
    rows = np.arange(12)[None]  # (1, 12)
    inside = (rows >= top[:, None]) & (rows < top[:, None] + 3)  # (n, 12)
    column = (inside * brightness[:, None]).astype(np.uint8)  # (n, 12)
    return np.repeat(column[:, :, None], 10, axis=2)[..., None]  # (n, 12, 10, 1)


def train(
    images: npt.NDArray[Any],
    config: subject.VaeConfig,
    seed: int = 1,
    on_epoch: Callable[[subject.EpochReport], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> subject.Vae:
    return subject.train_vae(images, config, seed=seed, device="cpu", on_epoch=on_epoch, should_stop=should_stop)


@pytest.fixture(scope="module")
def trained() -> Trained:
    reports: list[subject.EpochReport] = []
    vae = train(bars(512), config_for(epochs=14, beta=0.2), on_epoch=reports.append)
    return vae, reports


def test_kl_is_that_of_torch_distributions() -> None:
    """The analytic KL equals the one of an independent implementation."""
    draws = torch.Generator().manual_seed(0)
    mu, sigma = torch.randn(5, 3, generator=draws), torch.rand(5, 3, generator=draws) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, sigma), normal(torch.zeros(3), torch.ones(3))).sum(dim=1)
    torch.testing.assert_close(subject.gaussian_kl(mu, sigma), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_goes_in_and_comes_out(shape: tuple[int, int, int]) -> None:
    """Odd, flat and large images of one or three channels keep their shape, and [0, 1]."""
    vae = fresh(shape)
    with torch.no_grad():
        mu, sigma = vae.encode(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
        images = vae.decode(mu + 5 * sigma)
    assert mu.shape == sigma.shape == (2, 4)
    assert (sigma > 0).all()
    assert images.shape == (2, *shape)
    assert images.min() >= 0
    assert images.max() <= 1


def test_same_seed_same_weights_and_another_seed_others() -> None:
    """Training is its configuration and its seed."""
    images, config = bars(64), config_for()
    first, second, other = (vae_files.to_bytes(train(images, config, seed=seed)) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_the_global_generator_is_left_alone() -> None:
    """Training and loading draw nothing from torch's global generator, which belongs to others."""
    before = torch.get_rng_state()
    vae_files.from_bytes(vae_files.to_bytes(train(bars(64), config_for())))
    assert torch.equal(before, torch.get_rng_state())


def test_elbo_rises_and_every_epoch_is_reported(trained: Trained) -> None:
    """One report an epoch, in order, whose ELBO is its parts and ends higher than it began."""
    _, reports = trained
    assert [(r.epoch, r.epochs) for r in reports] == [(e, 14) for e in range(1, 15)]
    assert reports[-1].elbo > reports[0].elbo
    assert reports[-1].elbo == pytest.approx(-reports[-1].reconstruction - reports[-1].kl)
    assert reports[-1].kl > 0


def test_planted_factors_are_reconstructed(trained: Trained) -> None:
    """Unseen bars come back with their height and brightness, far better than the mean image would do."""
    vae, _ = trained
    images = bars(100, seed=9)
    mu, sigma = subject.encode_images(vae, images, device="cpu", batch_size=33)
    with torch.no_grad():
        decoded = vae.decode(torch.tensor(mu)).permute(0, 2, 3, 1).numpy()
    truth = images / 255
    assert mu.dtype == sigma.dtype == np.float32
    assert ((decoded - truth) ** 2).mean() < 0.1 * truth.var(axis=0).mean()


def test_latents_do_not_depend_on_the_batch(trained: Trained) -> None:
    """Encoding in batches of another size gives the same latents but for rounding."""
    vae, _ = trained
    whole, parts = (subject.encode_images(vae, bars(20), device="cpu", batch_size=size)[0] for size in (20, 3))
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_dead_dimensions_stay_finite() -> None:
    """A dimension where mu is constant keeps a positive sd, so a radius can be divided by it."""
    mu = np.stack([np.linspace(-1, 1, 50), np.full(50, 0.3)], axis=1).astype(np.float32)  # (50, 2)
    sd = subject.aggregate_sd(mu)
    assert sd == pytest.approx([mu[:, 0].std(), subject.SD_FLOOR])
    step = np.float32(0.5) * sd
    np.testing.assert_allclose((mu + step - mu) / sd, 0.5, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 33)])
def test_onnx_gives_what_torch_gives(shape: tuple[int, int, int]) -> None:
    """Both halves agree with torch at batches of 1, 2 and 7, under the promised names."""
    vae = fresh(shape)
    encoder, decoder = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for data in (vae_files.encoder_onnx(vae), vae_files.decoder_onnx(vae))
    )
    for n in (1, 2, 7):
        draws = torch.Generator().manual_seed(n)
        images, z = torch.rand(n, *shape, generator=draws), torch.randn(n, 4, generator=draws)
        with torch.no_grad():
            (mu, sigma), decoded = vae.encode(images), vae.decode(z)
        for got, want in zip(encoder.run(["mu", "sigma"], {"images": images.numpy()}), (mu, sigma), strict=True):
            np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
        np.testing.assert_allclose(decoder.run(["images"], {"z": z.numpy()})[0], decoded.numpy(), atol=1e-5)


def test_bytes_round_trip(trained: Trained) -> None:
    """A file gives back the config and, bit for bit, the decoder."""
    vae, _ = trained
    again = vae_files.from_bytes(vae_files.to_bytes(vae))
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert again.config == vae.config
    assert torch.equal(again.decode(z), vae.decode(z))


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x80\x04}."])
def test_other_files_are_refused(data: bytes) -> None:
    """What to_bytes did not write is a ValueError, a pickle included."""
    with pytest.raises(ValueError, match="no VAE file"):
        vae_files.from_bytes(data)


def test_training_stops_when_asked() -> None:
    """should_stop is asked between batches: no epoch completes after it says so."""
    reports: list[subject.EpochReport] = []
    asked: list[int] = []

    def stop_at_third_batch() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(subject.TrainingCancelled, match="epoch 2 of 3"):
        train(bars(64), config_for(), on_epoch=reports.append, should_stop=stop_at_third_batch)
    assert len(reports) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shape": (2, 28, 28)}, "1 or 3 channels"),
        ({"shape": (1, 7, 28)}, "8..128"),
        ({"shape": (1, 28, 129)}, "8..128"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"width": 20}, "width is 20"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 1.0}, "learning_rate is 1.0"),
        ({"beta": float("nan")}, "beta is nan"),
    ],
)
def test_bad_configurations_name_the_value(overrides: dict[str, Any], message: str) -> None:
    """A value out of range is refused where the config is made, by name and value."""
    with pytest.raises(ValueError, match=message):
        config_for(**overrides)


@pytest.mark.parametrize(
    "images", [bars(4).astype(np.float32), bars(4)[:, :, :9], bars(4)[..., 0], bars(0)], ids=["type", "w", "rank", "n"]
)
def test_images_that_do_not_fit_are_refused(images: npt.NDArray[Any]) -> None:
    """Images of another type, shape or number than the config says are a ValueError, before any training."""
    with pytest.raises(ValueError, match="give uint8"):
        train(images, config_for())


def test_larger_sets_train_for_fewer_epochs() -> None:
    """The default schedule follows the size of the data."""
    epochs = [subject.VaeConfig.for_shape((1, 28, 28), n).epochs for n in (1, 3000, 50_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[1] > epochs[2]
