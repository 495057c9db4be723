"""The training of a VAE.

It maximises the weighted ELBO in one cycle of Adam, with a checkpoint after every epoch.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.generator.vae import Vae, VaeConfig, check_images, gaussian_means, new_vae, to_tensor

# Of a loss summed over pixels. Bernoulli gradients reach it in the first steps only; Gaussian ones grow as the error
# falls (unbounded, a mean of 10,000 in mid-training), so that single images could dominate a step.
_MAX_GRADIENT_NORM = {"bernoulli": 200.0, "gaussian": 4_000.0}
# Least variance of a pixel, 2.5 gray levels squared; without it, a nearly flat image would outweigh all others.
_LEAST_VARIANCE = 1e-4
_WARMUP = 0.15  # share of the steps on which the learning rate rises


class TrainingCancelled(Exception):
    """Raised when the caller cancelled the training."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Means over one epoch, in nats an image.

    `epoch` counts from 1 to `epochs`.
    """

    epoch: int
    epochs: int
    reconstruction: float  # -log p(x|z); of a density, so it may be negative with the Gaussian likelihood
    kl: float  # KL(q(z|x) || N(0, I)), unweighted

    @property
    def elbo(self) -> float:
        return -self.reconstruction - self.kl


class _Training:
    """The state of a training after an epoch.

    It has the weights, the moments of Adam and the state of the generator.
    """

    def __init__(self, config: VaeConfig, seed: int, device: torch.device | str) -> None:
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices see the same draws
        self.vae = new_vae(config, self.generator).to(device).train()
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))

    def to_bytes(self) -> bytes:
        """Return a checkpoint as a safetensors file."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"vae.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        tensors |= {f"adam.{index}.{name}": value for index, state in moments.items() for name, value in state.items()}
        tensors["draws"] = self.generator.get_state()
        return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def restore(self, checkpoint: bytes) -> None:
        """Resume from a checkpoint of `to_bytes`."""
        tensors = safetensors.torch.load(checkpoint)
        self.generator.set_state(tensors.pop("draws"))
        weights = {name.removeprefix("vae."): tensor for name, tensor in tensors.items() if name.startswith("vae.")}
        self.vae.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def train_vae(
    images: npt.NDArray[np.uint8],
    config: VaeConfig,
    *,
    seed: int,
    device: torch.device | str,
    on_epoch: Callable[[EpochReport], None],
    should_stop: Callable[[], bool],
    resume: tuple[int, bytes] | None = None,
    on_checkpoint: Callable[[int, bytes], None] = lambda _epoch, _checkpoint: None,
) -> Vae:
    """Train a VAE on images (n, h, w, c) uint8 and return it.

    It maximises the weighted ELBO. The model is on `device`, in eval mode. Every draw
    comes from `seed`: equal seeds give equal weights on one machine with the same
    number of threads. `on_epoch` is called after each epoch, `should_stop` before each
    batch. `on_checkpoint` gets the number of finished epochs and a checkpoint after
    each epoch; the last such pair, as `resume`, continues to the same weights. Raises
    ValueError for images that the config does not describe, TrainingCancelled when
    `should_stop` returns True, and FloatingPointError when the loss is no longer
    finite.
    """
    check_images(images, config)
    training = _Training(config, seed, device)
    vae, optimizer, generator = training.vae, training.optimizer, training.generator
    finished = 0
    if resume:
        finished = resume[0]
        training.restore(resume[1])
    for epoch in range(finished, config.epochs):
        totals, order = np.zeros(2), torch.randperm(len(images), generator=generator).numpy()  # (2,), (n,)
        for start in range(0, len(images), config.batch_size):
            if should_stop():
                raise TrainingCancelled(f"VAE training was cancelled in epoch {epoch + 1} of {config.epochs}")
            rate = config.learning_rate * one_cycle((epoch + start / len(images)) / config.epochs)
            batch = to_tensor(images[order[start : start + config.batch_size]], device)  # (b, c, h, w)
            batch = vae.reduce(batch)  # (b, c, h', w')
            batch = random_shift(batch, config.max_shift, generator)
            totals += _step(vae, optimizer, batch, rate, generator)
        if not np.isfinite(totals).all():
            raise FloatingPointError(f"the loss is {totals} in epoch {epoch + 1}: lower learning_rate {rate:.1e}")
        reconstruction, kl = (totals / len(images)).tolist()
        on_checkpoint(epoch + 1, training.to_bytes())
        on_epoch(EpochReport(epoch=epoch + 1, epochs=config.epochs, reconstruction=reconstruction, kl=kl))
    return vae.eval()


def seconds_per_image(images: npt.NDArray[np.uint8], config: VaeConfig, *, device: torch.device | str) -> float:
    """Return the measured time of a training step per image, in seconds.

    A first step on batches of `images` is not counted.
    """
    training = _Training(config, 0, device)
    batches = [images[i : i + config.batch_size] for i in range(0, len(images), config.batch_size)]
    begin, counted = time.perf_counter(), 0
    for position, batch in enumerate([batches[0], *batches]):
        if position == 1:
            begin = time.perf_counter()
        copies = training.vae.reduce(to_tensor(batch, device))
        _step(training.vae, training.optimizer, copies, config.learning_rate, training.generator)
        counted += len(batch) if position else 0
    return (time.perf_counter() - begin) / counted


def one_cycle(progress: float) -> float:
    """Return the learning rate at a share of the training.

    It is a share of the peak rate, which rises linearly and falls along a cosine (Smith & Topin 2018,
    arXiv:1708.07120).
    """
    if progress < _WARMUP:
        return 0.04 + 0.96 * progress / _WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP))


def gaussian_kl(mu: Tensor, sigma: Tensor) -> Tensor:
    """Return KL(N(mu, diag(sigma^2)) || N(0, I)) in nats (n,) of (n, d).

    The formula is in appendix B of Kingma & Welling.
    """
    return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum(dim=1)  # (n, d) -> (n,)


def reconstruction_loss(parameters: Tensor, images: Tensor, likelihood: str) -> Tensor:
    """Return -log p(images | parameters) in nats (b,), both (b, c, h, w).

    The Gaussian variance is each image's maximum-likelihood one, its own squared error.
    Relative changes of the error therefore count: a sign in a dark photograph weighs as
    much as one in the sun.
    """
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(parameters, images, reduction="none").flatten(1).sum(dim=1)
    variance = (gaussian_means(parameters) - images).square().flatten(1).mean(dim=1) + _LEAST_VARIANCE  # (b,)
    return 0.5 * images[0].numel() * (2 * math.pi * math.e * variance).log()


def random_shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift images (b, c, h, w) by up to `most` pixels each way.

    Edges are repeated. With 0 nothing is drawn.
    """
    if not most:
        return images
    offsets = torch.randint(2 * most + 1, (2, len(images)), generator=generator)  # (2, b), on the CPU as all draws
    windows = F.pad(images, (most,) * 4, mode="replicate").unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    down, right = offsets.to(images.device)  # windows: (b, c, 2 most + 1, 2 most + 1, h, w)
    return windows[torch.arange(len(images), device=images.device), :, down, right]  # (b, c, h, w)


def _step(
    vae: Vae, optimizer: torch.optim.Optimizer, images: Tensor, rate: float, generator: torch.Generator
) -> npt.NDArray[np.float64]:
    """Make one training step on copies of images (b, c, h', w').

    Returns the summed reconstruction loss and KL (2,) in nats.
    """
    optimizer.param_groups[0]["lr"] = rate
    mu, sigma = vae.encode_copies(images)
    eps = torch.randn(mu.shape, generator=generator).to(mu.device)  # (b, d)
    parameters = vae.decode_parameters(mu + sigma * eps)
    reconstruction = reconstruction_loss(parameters, images, vae.config.likelihood).sum()
    kl = gaussian_kl(mu, sigma).sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward((reconstruction + vae.config.beta * kl) / len(images))
    nn.utils.clip_grad_norm_(vae.parameters(), _MAX_GRADIENT_NORM[vae.config.likelihood])
    optimizer.step()
    return np.array([reconstruction.item(), kl.item()])
