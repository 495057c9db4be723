from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from services.generator.codec import as_array, vae_codec
from services.generator.vae import Vae, VaeConfig, gaussian_means, to_bytes
from services.generator.vae_training import (
    EpochReport,
    TrainingCancelled,
    gaussian_kl,
    one_cycle,
    random_shift,
    reconstruction_loss,
    seconds_per_image,
    train_vae,
)
from tests.unit.generator.bars import bars, config_for

Trained = tuple[Vae, list[EpochReport]]
Checkpoints = list[tuple[int, bytes]]
# A training in which everything that may draw, draws.
DRAWING: dict[str, Any] = {"likelihood": "gaussian", "max_shift": 1, "beta": 1.0}


def train(
    images: Any,
    config: VaeConfig,
    seed: int = 1,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    **more: Any,
) -> Vae:
    return train_vae(images, config, seed=seed, device="cpu", on_epoch=on_epoch, should_stop=should_stop, **more)


@pytest.fixture(scope="module")
def trained() -> Trained:
    reports: list[EpochReport] = []
    vae = train(bars(512), config_for(epochs=14, beta=0.2), on_epoch=reports.append)
    return vae, reports


def planted_pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a decoder answers, and images, (2, 3, 8, 8), that are no good reconstructions of each other."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 8, generator=draws), torch.rand(2, 3, 8, 8, generator=draws)


def stopped_after(epochs: int, config: VaeConfig) -> Checkpoints:
    """Train until so many epochs are over, as a worker that dies then; return what it left."""
    left: Checkpoints = []
    with pytest.raises(TrainingCancelled):
        train(
            bars(70),
            config,
            should_stop=lambda: len(left) == epochs,
            on_checkpoint=lambda epoch, data: left.append((epoch, data)),
        )
    return left


def test_kl_is_that_of_torch_distributions() -> None:
    """The analytic KL equals the one of an independent implementation."""
    draws = torch.Generator().manual_seed(0)
    mu, sigma = torch.randn(5, 3, generator=draws), torch.rand(5, 3, generator=draws) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, sigma), normal(torch.zeros(3), torch.ones(3))).sum(dim=1)
    torch.testing.assert_close(gaussian_kl(mu, sigma), expected)


def test_bernoulli_loss_is_that_of_torch_distributions() -> None:
    """The loss of gray images is the negative log density of an independent implementation, for each image."""
    logits, images = planted_pixels()
    expected = torch.distributions.ContinuousBernoulli(logits=logits)
    likelihood = expected.log_prob(images) - expected._cont_bern_log_norm()  # as the VAE leaves it: not normalised
    torch.testing.assert_close(reconstruction_loss(logits, images, "bernoulli"), -likelihood.flatten(1).sum(dim=1))


def test_gaussian_loss_is_that_of_torch_distributions_at_the_most_likely_variance() -> None:
    """No other variance makes the image more likely; the loss is the density there, but for the least variance."""
    parameters, images = planted_pixels()
    means, loss = gaussian_means(parameters), reconstruction_loss(parameters, images, "gaussian")
    error = (means - images).square().flatten(1).mean(dim=1)[:, None, None, None]  # (b, 1, 1, 1)
    at = [
        -torch.distributions.Normal(means, (k * error).sqrt()).log_prob(images).flatten(1).sum(1) for k in (0.7, 1, 1.4)
    ]
    torch.testing.assert_close(loss, at[1], rtol=5e-3, atol=0.05)
    assert (at[0] > loss).all()
    assert (at[2] > loss).all()


@pytest.mark.parametrize(("likelihood", "least", "most"), [("gaussian", 0.9, 1), ("bernoulli", 0, 0.1)])
def test_an_image_of_low_contrast_counts_as_another(likelihood: str, least: float, most: float) -> None:
    """The same relative improvement gains the same nats at any contrast; Bernoulli pixels gain less at a low one."""
    high = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    gains = []
    for around_gray in (0.2 * high, high):
        shown = [0.5 + share * around_gray for share in (0.2, 0.6)]  # worse and better reconstructions
        answers = [images.logit() if likelihood == "bernoulli" else 4 * (images - 0.5) for images in shown]
        worse, better = (reconstruction_loss(answer, 0.5 + around_gray, likelihood) for answer in answers)
        gains.append(float(worse - better))
    assert least < gains[0] / gains[1] <= most


@pytest.mark.parametrize("most", [1, 3])
def test_shifts_are_those_that_were_planted(most: int) -> None:
    """A dot moves by every offset up to the most, as the whole image does with its edge repeated, and by no other."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    ramps = torch.stack([rows, columns]).expand(400, 2, 12, 10)  # a pixel is its own coordinates
    moved = random_shift(ramps, most, torch.Generator().manual_seed(0))
    down, right = (moved[:, 0, 6, 5] - 6).long(), (moved[:, 1, 6, 5] - 5).long()
    assert set(down.tolist()) == set(right.tolist()) == set(range(-most, most + 1))
    assert len({*zip(down.tolist(), right.tolist(), strict=True)}) == (2 * most + 1) ** 2
    torch.testing.assert_close(moved[:, 0], (rows + down[:, None, None]).clamp(0, 11))
    torch.testing.assert_close(moved[:, 1], (columns + right[:, None, None]).clamp(0, 9))


def test_no_shift_draws_nothing() -> None:
    """Images that stay where they are leave the draws of the training as they were."""
    generator, images = torch.Generator().manual_seed(0), torch.rand(2, 1, 12, 10)
    before = generator.get_state()
    assert random_shift(images, 0, generator) is images
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("overrides", [{}, DRAWING])
def test_same_seed_same_weights_and_another_seed_others(overrides: dict[str, Any]) -> None:
    """Training is its configuration and its seed."""
    images, config = bars(64), config_for(**overrides)
    first, second, other = (to_bytes(train(images, config, seed=seed)) for seed in (3, 3, 4))
    assert first == second
    assert first != other


@pytest.mark.parametrize("overrides", [{}, DRAWING])
@pytest.mark.parametrize("epochs", [1, 2])
def test_training_goes_on_from_its_checkpoint_to_the_same_weights(epochs: int, overrides: dict[str, Any]) -> None:
    """Stopped after an epoch and resumed, training gives bit for bit the weights of one that was never stopped."""
    config = config_for(**overrides)
    left = stopped_after(epochs, config)
    assert [epoch for epoch, _ in left] == list(range(1, epochs + 1))
    reports: list[EpochReport] = []
    whole = train(bars(70), config)
    resumed = train(bars(70), config, resume=left[-1], on_epoch=reports.append)
    assert [report.epoch for report in reports] == list(range(epochs + 1, 4))
    assert to_bytes(resumed) == to_bytes(whole)


def test_a_checkpoint_of_the_last_epoch_is_the_model() -> None:
    """A training that died after its last epoch has nothing left to do."""
    config, left = config_for(), Checkpoints()
    whole = train(bars(70), config, on_checkpoint=lambda epoch, data: left.append((epoch, data)))
    assert [epoch for epoch, _ in left] == [1, 2, 3]
    resumed = train(bars(70), config, resume=left[-1], should_stop=lambda: pytest.fail("a batch was trained"))
    assert to_bytes(resumed) == to_bytes(whole)


def test_a_checkpoint_is_taken_over_whatever_the_seed() -> None:
    """The checkpoint's weights, moments and draws are resumed, none of the new start's."""
    config = config_for()
    left = stopped_after(1, config)[-1]
    first, second = (to_bytes(train(bars(70), config, seed=seed, resume=left)) for seed in (1, 2))
    assert first == second


@pytest.mark.parametrize("overrides", [{}, DRAWING])
def test_the_global_generator_is_left_alone(overrides: dict[str, Any]) -> None:
    """Training draws nothing from torch's global generator, which belongs to others."""
    before = torch.get_rng_state()
    train(bars(64), config_for(**overrides))
    assert torch.equal(before, torch.get_rng_state())


def test_elbo_rises_and_every_epoch_is_reported(trained: Trained) -> None:
    """One report an epoch, in order, whose ELBO is its parts and ends higher than it began."""
    _, reports = trained
    assert [(r.epoch, r.epochs) for r in reports] == [(e, 14) for e in range(1, 15)]
    assert reports[-1].elbo > reports[0].elbo
    assert reports[-1].elbo == pytest.approx(-reports[-1].reconstruction - reports[-1].kl)
    assert reports[-1].kl > 0


def error_share(vae: Vae, images: Any) -> float:
    """Return the squared error of reconstructed images (n, h, w, c), in units of what the mean image would have."""
    pair, truth = vae_codec(vae, torch.device("cpu")), images / 255
    decoded = as_array(pair.decode(pair.encode_stored(images)[0])).transpose(0, 2, 3, 1)
    return float(((decoded - truth) ** 2).mean() / truth.var(axis=0).mean())


def test_planted_factors_are_reconstructed(trained: Trained) -> None:
    """Unseen bars come back with their height and brightness, far better than the mean image would do."""
    assert error_share(trained[0], bars(100, seed=9)) < 0.1


def test_planted_factors_in_colour_are_reconstructed() -> None:
    """The same with the defaults of colour, also at a tenth of the light, where Bernoulli pixels leave 0.75."""
    colours = np.array([1, 0.5, 0.25])  # (3,)
    lights = {seed: (light * bars(256, seed=seed) * colours).astype(np.uint8) for seed, light in ((0, 1.0), (1, 0.1))}
    vae = train(np.concatenate([*lights.values()]), config_for((3, 12, 10), epochs=25, latent_dim=8, batch_size=16))
    bright, dark = ((light * bars(100, seed=9) * colours).astype(np.uint8) for light in (1.0, 0.1))
    assert error_share(vae, bright) < 0.2
    assert error_share(vae, dark) < 0.2


def test_training_stops_when_asked() -> None:
    """should_stop is asked between batches: no epoch completes after it says so."""
    reports: list[EpochReport] = []
    asked: list[int] = []

    def stop_at_third_batch() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(TrainingCancelled, match="epoch 2 of 3"):
        train(bars(64), config_for(), on_epoch=reports.append, should_stop=stop_at_third_batch)
    assert len(reports) == 1


@pytest.mark.parametrize(
    "images", [bars(4).astype(np.float32), bars(4)[:, :, :9], bars(4)[..., 0], bars(0)], ids=["type", "w", "rank", "n"]
)
def test_images_that_do_not_fit_are_refused(images: Any) -> None:
    """Images of another type, shape or number than the config says are a ValueError, before any training."""
    with pytest.raises(ValueError, match="give uint8"):
        train(images, config_for(), should_stop=lambda: pytest.fail("a batch was trained"))


def test_the_learning_rate_rises_and_falls() -> None:
    """One cycle: from nearly nothing up to the peak, then down to nothing."""
    shares = [one_cycle(step / 100) for step in range(101)]
    peak = shares.index(max(shares))
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert [shares[0], shares[peak], shares[-1]] == pytest.approx([0.04, 1, 0])
    assert 10 <= peak <= 20


@pytest.mark.parametrize("count", [5, 32, 70])
def test_a_training_step_is_measured(count: int) -> None:
    """The seconds an image are measured on whatever number of batches there is, and are of this world."""
    seconds = seconds_per_image(bars(count), config_for(), device="cpu")
    assert 0 < seconds < 60
