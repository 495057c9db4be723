"""Rendering: how a perturbed latent becomes an image.

The rendering `decoder` decodes the latent z, as published. The rendering `residual` changes the source image x, whose
latent is mu, by the difference of two decoded images:

    x' = clip(x + D(z) - D(mu)).

Without a step, x' is x itself, so nothing is lost to reconstruction. D is the decoder, with bilinear enlargement where
the autoencoder works on smaller copies of the images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.arrays import Array, as_floats

# Numpy arrays, or torch tensors on the decoder's device.
Images = Any
Codes = Any
NO_SOURCE = -1
"""Source of latents that are drawn from a distribution rather than around a real image."""


@dataclass(frozen=True, kw_only=True)
class Perturbations:
    """Latents with the real images that they change: what a rendered image is made of."""

    # (n, d)
    latent: Array
    # (n,) rows of the searched split, or NO_SOURCE
    source: Array

    def __len__(self) -> int:
        return len(self.latent)

    @classmethod
    def none(cls, latent_dim: int) -> "Perturbations":
        return cls(latent=np.zeros((0, latent_dim), np.float32), source=np.zeros(0, np.int64))

    @classmethod
    def joined(cls, parts: "Sequence[Perturbations]") -> "Perturbations":
        return cls(
            latent=np.concatenate([part.latent for part in parts]).astype(np.float32),
            source=np.concatenate([part.source for part in parts]),
        )

    def take(self, keep: Array | slice) -> "Perturbations":
        """Return the perturbations that a mask, an index or a slice selects."""
        return Perturbations(latent=self.latent[keep], source=self.source[keep])


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """The real images that perturbations change, with their latents."""

    # (s,) rows of the searched split, ascending
    row: Array
    # (s, d) posterior means
    mu: Array
    # (N, h, w, c) uint8, all images of the split
    images: Array

    def mu_of(self, row: Array) -> Array:
        """Return the posterior means (n, d) of images at rows (n,)."""
        return np.asarray(self.mu[np.searchsorted(self.row, row)])


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders latents as images; with `sources`, as changes of their source images."""

    # Latents (n, d), arrays or tensors on any device, to images (n, c, h, w) in [0, 1].
    decode: Callable[[Codes], Images]
    # None renders `decoder`.
    sources: SourceImages | None = None

    def __call__(self, z: Codes, source: Array) -> Images:
        """Return the images (n, c, h, w) in [0, 1] of latents z (n, d) around sources (n,).

        They have the type of the decoder's images, and are on its device.
        """
        if self.sources is None:
            return self.decode(z)
        # Consecutive perturbations share their sources, which are decoded once.
        row, position = np.unique(source, return_inverse=True)
        base, images = self.decode(self.sources.mu_of(row)), as_floats(self.sources.images[row])
        return _residual(self.decode(z), base, images, position)


def _residual(decoded: Images, base: Images, images: Array, position: Array) -> Images:
    """Return `clip(x + decoded - base)`, (n, c, h, w).

    `base` and `images` (s, c, h, w) are those of the sources, and `position` (n,) names the source of each image.
    """
    changed = torch.as_tensor(decoded)
    at = torch.as_tensor(position, device=changed.device)
    unchanged = torch.as_tensor(images, device=changed.device) - torch.as_tensor(base)
    rendered = (changed + unchanged.index_select(0, at)).clamp_(0, 1)
    return rendered if isinstance(decoded, Tensor) else rendered.numpy()


def resize_weights(given: int, wanted: int) -> Array:
    """Return the weights (wanted, given) of a linear resize of one axis.

    Enlargement is bilinear; reduction averages with a triangle as wide as two new pixels, which avoids aliasing. Pixels
    are squares, so that both grids share their edges. A matrix is the same in torch, ONNX Runtime and on any device.
    """
    scale = given / wanted
    centre = (np.arange(wanted) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(given)[None, :] - np.clip(centre, 0, given - 1)[:, None]) / max(scale, 1.0)
    weight = np.maximum(1 - distance, 0)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), np.float32)


def limited_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Return height and width of a copy whose larger side is at most `max_side`."""
    scale = min(1.0, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class Resize(torch.nn.Module):
    """Resizes images (n, c, h, w) linearly; equal sizes are left as they are."""

    def __init__(self, given: tuple[int, int], wanted: tuple[int, int]) -> None:
        super().__init__()
        self.unchanged = given == wanted
        # No buffers: they follow from the sizes, also where a network is made without memory and filled later.
        self._down, self._across = (
            torch.tensor(resize_weights(*sizes), device="cpu") for sizes in zip(given, wanted, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return images (n, c, H, W) of images (n, c, h, w)."""
        if self.unchanged:
            return images
        return self._down.to(images.device) @ images @ self._across.T.to(images.device)
