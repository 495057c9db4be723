"""A small convolutional variational autoencoder: images to latents and back, and its training.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114); the KL weight `beta` is Higgins et al. 2017.
Figures that led to the defaults are in docs/method.md.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SD_FLOOR = 1e-3
"""Least aggregate sd. A dead latent dimension (mu constant) would otherwise divide by zero in a radius or a density."""

_LOG_SIGMA_RANGE = (-6.0, 3.0)  # keeps sigma and the KL finite, far outside of what trained encoders return
_MAX_GRADIENT_NORM = 200.0  # of a loss summed over pixels; reached in the first steps only
_WARMUP = 0.15  # share of the steps on which the learning rate rises

_RANGES = {"latent_dim": (1, 512), "width": (8, 256), "epochs": (1, 10_000), "batch_size": (1, 8192)}
_RANGES_REAL = {"learning_rate": (1e-6, 0.1), "beta": (0.0, 100.0)}


class TrainingCancelled(Exception):
    """Training stopped because the caller asked for it; no model is returned."""


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Architecture and schedule of one VAE.

    `image_shape` is (channels, height, width) in pixels; `width` the channels at half resolution of a 32-pixel image;
    `beta` the weight of the KL in nats. ValueError names the field, its value and the range.
    """

    image_shape: tuple[int, int, int]
    latent_dim: int
    width: int = 32
    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_shape(self.image_shape)
        for name, (low, high) in (_RANGES | _RANGES_REAL).items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {value}: choose a value from {low:g} to {high:g}")
        if self.width % 8:
            raise ValueError(f"width is {self.width}: choose a multiple of 8, deeper images halve it")

    @classmethod
    def for_shape(cls, image_shape: tuple[int, int, int], n_images: int, **overrides: Any) -> Self:
        """Choose architecture and schedule for `n_images` images of (c, h, w); `overrides` replace single fields."""
        _check_shape(image_shape)
        if n_images < 1:
            raise ValueError(f"n_images is {n_images}: a VAE needs at least one image")
        c, h, w = image_shape
        epochs = min(200, 5 + 90_000 // n_images)  # few images need steps: 35 epochs of 3,000 images, 6 of 50,000
        latent_dim, beta = (64, 0.02) if c == 3 else (min(32, h * w // 16), 0.5)
        defaults: dict[str, Any] = {"latent_dim": latent_dim, "epochs": epochs, "beta": beta}
        return cls(image_shape=(c, h, w), **defaults | overrides)

    @property
    def levels(self) -> int:
        """Halvings of the image, so that the deepest grid is at most 8 pixels a side."""
        return max(2, math.ceil(math.log2(max(self.image_shape[1:]) / 8)))


def _check_shape(image_shape: tuple[int, int, int]) -> None:
    if len(image_shape) != 3 or image_shape[0] not in {1, 3}:
        raise ValueError(f"image_shape is {image_shape}: give (channels, height, width) with 1 or 3 channels")
    if not all(8 <= side <= 128 for side in image_shape[1:]):
        raise ValueError(f"image_shape is {image_shape}: resize to 8..128 pixels each side")


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Means over one epoch, in nats an image; `epoch` counts from 1 to `epochs`."""

    epoch: int
    epochs: int
    reconstruction: float  # -log p(x|z)
    kl: float  # KL(q(z|x) || N(0, I)), unweighted

    @property
    def elbo(self) -> float:
        return -self.reconstruction - self.kl


class Vae(nn.Module):
    """Encoder q(z|x) = N(mu, diag(sigma^2)) and decoder p(x|z) = Bernoulli(images), with prior N(0, I).

    Images are padded to a multiple of 2^levels by repeating their last row and column, and cropped on the way out.
    `new_vae` gives seeded weights; the constructor alone gives torch's own.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        c, h, w = config.image_shape
        self.grid = (math.ceil(h / 2**config.levels), math.ceil(w / 2**config.levels))
        widths = _widths(config)
        flat = widths[-1] * self.grid[0] * self.grid[1]
        self.encoder = nn.Sequential(
            *_down(c, widths), _Residual(widths[-1]), nn.SiLU(), nn.Flatten(), nn.Linear(flat, 2 * config.latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, flat),
            nn.Unflatten(1, (widths[-1], *self.grid)),
            _Residual(widths[-1]),
            *_up(c, widths),
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma (n, d) of images (n, c, h, w) in [0, 1]."""
        _, h, w = self.config.image_shape
        below, right = self.grid[0] * 2**self.config.levels - h, self.grid[1] * 2**self.config.levels - w
        padded = F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images  # (n, c, H, W)
        mu, log_sigma = self.encoder(padded).chunk(2, dim=1)  # (n, 2d) -> 2 x (n, d)
        return mu, log_sigma.clamp(*_LOG_SIGMA_RANGE).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Return images (n, c, h, w) in [0, 1] of latents z (n, d)."""
        return self.decode_logits(z).sigmoid()

    def decode_logits(self, z: Tensor) -> Tensor:
        _, h, w = self.config.image_shape
        logits: Tensor = self.decoder(z)  # (n, c, H, W)
        return logits[:, :, :h, :w]  # (n, c, h, w)


class _Residual(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv:1603.05027); the identity when new."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.last(F.silu(self.first(F.silu(x))))
        return x + residual


def _down(channels: int, widths: list[int]) -> Iterator[nn.Module]:
    for inputs, outputs in itertools.pairwise([channels, *widths]):
        yield nn.Identity() if inputs == channels else nn.SiLU()  # pixels need no activation
        yield nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)  # (n, i, H, W) -> (n, o, H/2, W/2)


def _up(channels: int, widths: list[int]) -> Iterator[nn.Module]:
    """Double the grid by sub-pixel convolution (Shi et al. 2016, arXiv:1609.05158): no full-size feature maps."""
    for outputs, inputs in reversed(list(itertools.pairwise([channels, *widths]))):
        yield nn.SiLU()
        yield nn.Conv2d(inputs, 4 * outputs, 3, padding=1)
        yield nn.PixelShuffle(2)  # (n, 4o, H, W) -> (n, o, 2H, 2W)


def _widths(config: VaeConfig) -> list[int]:
    """Channels per level, shallow to deep: halved where the grid doubles, so that levels cost about the same."""
    return [max(8, config.width * 2 // 2**depth) for depth in reversed(range(config.levels))]


def new_vae(config: VaeConfig, generator: torch.Generator) -> Vae:
    """Return a Vae on the CPU with weights drawn from `generator` only (the global one is not touched)."""
    vae = empty_vae(config).to_empty(device="cpu")
    for name, parameter in vae.named_parameters():
        is_zero = name.endswith(("bias", "last.weight"))  # residual blocks begin as the identity
        bound = 0.0 if is_zero else 1 / math.sqrt(parameter[0].numel())  # one over the root of the fan-in
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return vae


def empty_vae(config: VaeConfig) -> Vae:
    with torch.device("meta"):  # no memory, and no draw from the global generator
        return Vae(config)


def train_vae(
    images: npt.NDArray[np.uint8],
    config: VaeConfig,
    *,
    seed: int,
    device: torch.device | str,
    on_epoch: Callable[[EpochReport], None],
    should_stop: Callable[[], bool],
) -> Vae:
    """Maximise the weighted ELBO on uint8 images (n, h, w, c); return the model on `device`, in eval mode.

    Every draw comes from `seed`: same seed, same weights on one machine with as many threads. `on_epoch` is called
    after each epoch, `should_stop` before each batch. ValueError: images that the config does not describe.
    TrainingCancelled: `should_stop` said so. FloatingPointError: the loss left the finite numbers.
    """
    _check_images(images, config)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that any device sees the same draws
    vae = new_vae(config, generator).to(device).train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    for epoch in range(config.epochs):
        totals, order = np.zeros(2), torch.randperm(len(images), generator=generator).numpy()  # (2,), (n,)
        for start in range(0, len(images), config.batch_size):
            if should_stop():
                raise TrainingCancelled(f"VAE training was cancelled in epoch {epoch + 1} of {config.epochs}")
            rate = config.learning_rate * one_cycle((epoch + start / len(images)) / config.epochs)
            batch = _to_tensor(images[order[start : start + config.batch_size]], device)  # (b, c, h, w)
            totals += _step(vae, optimizer, batch, rate, generator)
        if not np.isfinite(totals).all():
            raise FloatingPointError(f"the loss is {totals} in epoch {epoch + 1}: lower learning_rate {rate:.1e}")
        reconstruction, kl = (totals / len(images)).tolist()
        on_epoch(EpochReport(epoch=epoch + 1, epochs=config.epochs, reconstruction=reconstruction, kl=kl))
    return vae.eval()


def one_cycle(progress: float) -> float:
    """Return the share of the peak learning rate: linear up, cosine down (Smith & Topin 2018, arXiv:1708.07120)."""
    if progress < _WARMUP:
        return 0.04 + 0.96 * progress / _WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP))


def gaussian_kl(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, diag(sigma^2)) || N(0, I)) in nats (n,) of (n, d): Kingma & Welling, appendix B."""
    return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum(dim=1)  # (n, d) -> (n,)


def _step(
    vae: Vae, optimizer: torch.optim.Optimizer, images: Tensor, rate: float, generator: torch.Generator
) -> npt.NDArray[np.float64]:
    """Take one step on images (b, c, h, w); return the summed reconstruction loss and KL (2,) in nats."""
    optimizer.param_groups[0]["lr"] = rate
    mu, sigma = vae.encode(images)
    eps = torch.randn(mu.shape, generator=generator).to(mu.device)  # (b, d)
    logits = vae.decode_logits(mu + sigma * eps)
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    kl = gaussian_kl(mu, sigma).sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward((reconstruction + vae.config.beta * kl) / len(images))
    nn.utils.clip_grad_norm_(vae.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    return np.array([reconstruction.item(), kl.item()])


def _check_images(images: npt.NDArray[np.uint8], config: VaeConfig) -> None:
    c, h, w = config.image_shape
    if images.dtype != np.uint8 or images.shape[1:] != (h, w, c) or not len(images):
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 (n, {h}, {w}, {c}) with n > 0")


def _to_tensor(images: npt.NDArray[np.uint8], device: torch.device | str) -> Tensor:
    pixels = torch.from_numpy(np.array(images)).to(device)  # a copy: torch warns of arrays that it may not write
    return pixels.permute(0, 3, 1, 2).float().contiguous() / 255  # (n, h, w, c) -> (n, c, h, w)


def aggregate_sd(mu: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Return the sd of posterior means (n, d) over images, per dimension (d,), never below SD_FLOOR.

    Dead dimensions stay, at the floor: a step there moves nothing that the decoder reads, and dividing by it is safe.
    """
    sd: npt.NDArray[np.float64] = np.std(mu, axis=0, dtype=np.float64)  # (n, d) -> (d,)
    return np.maximum(sd, SD_FLOOR).astype(np.float32)


def encode_images(
    vae: Vae, images: npt.NDArray[np.uint8], *, device: torch.device | str, batch_size: int = 512
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return mu and sigma (n, d) of uint8 images (n, h, w, c), encoded on `device` in batches."""
    _check_images(images, vae.config)
    vae = vae.to(device).eval()
    with torch.inference_mode():
        parts = [vae.encode(_to_tensor(images[i : i + batch_size], device)) for i in range(0, len(images), batch_size)]
    mu, sigma = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))  # 2 x (n, d)
    return mu, sigma
