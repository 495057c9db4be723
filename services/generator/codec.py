"""Codecs, which map images to latents and back.

A codec is our VAE, or a user's pair of ONNX files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.arrays import Array, as_floats
from services.generator.vae import Vae
from services.latent_space.rendering import Codes, Images

OnnxFunction = Callable[..., list[Array]]
# Images of one forward pass, for callers without batches of their own.
_BATCH = 512

# Mean distance of decoded values to [0, 1] beyond which they are not pixels. A decoder with a linear output has up to
# 0.04 (digits, 16 principal components), one for [-1, 1] or for normalised images 0.24 and more.
_OVERSHOOT = 0.1

SD_FLOOR = 1e-3
"""Least aggregate sd. A dead latent dimension (mu constant) would otherwise divide by zero in a radius or a density."""


class CodecMismatch(ValueError):
    """Raised when encoder and decoder do not fit images or each other."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """An encoder and a decoder as functions of arrays.

    The arithmetic is float32 throughout, although bfloat16 would be faster: two decodes of one latent, in any batch and
    on any machine, must give the same image up to rounding. A failure could not be reproduced otherwise.
    """

    # images (n, c, h, w) float32 in [0, 1], arrays or tensors on any device -> mu, sigma (n, d)
    encode: Callable[[Images], tuple[Array, Array]]
    # z (n, d) float32, arrays or tensors on any device -> images (n, c, h, w) float32 in [0, 1], on the decoder's
    # device
    decode: Callable[[Codes], Images]
    latent_dim: int
    # channels, height, width
    image_shape: tuple[int, int, int]

    def encode_stored(self, images: Array) -> tuple[Array, Array]:
        """Return mu and sigma (n, d) of stored images (n, h, w, c) uint8.

        The images are encoded in bounded batches.
        """
        parts = [self.encode(as_floats(images[begin : begin + _BATCH])) for begin in range(0, len(images), _BATCH)]
        nothing = np.zeros((0, self.latent_dim), np.float32)
        mu, sigma = zip(*parts, strict=True) if parts else ((nothing,), (nothing,))
        return np.concatenate(mu), np.concatenate(sigma)


def aggregate_sd(mu: Array) -> Array:
    """Return the sd (d,) of posterior means (n, d) by dimension.

    It is over images, and at least SD_FLOOR. Dead dimensions have this floor: a step there changes nothing that the
    decoder reads, and division is safe.
    """
    return np.asarray(np.maximum(np.std(mu, axis=0, dtype=np.float64), SD_FLOOR), np.float32)


def vae_codec(vae: Vae, device: torch.device) -> Codec:
    """Return a trained VAE as a codec on a device.

    It uses channels-last weights: 64 us an image instead of 74 with contiguous weights,
    where ONNX Runtime needs 73 (MNIST's decoder, 2 cores with AVX-512, medians).
    """
    network = vae.to(device).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    @torch.inference_mode()
    def encode(images: Images) -> tuple[Array, Array]:
        mu, sigma = network.encode(torch.as_tensor(images).to(device, memory_format=torch.channels_last))
        return mu.cpu().numpy(), sigma.cpu().numpy()

    @torch.inference_mode()
    def decode(z: Codes) -> Images:
        return network.decode(torch.as_tensor(z).to(device)).contiguous()

    return Codec(encode=encode, decode=decode, latent_dim=vae.config.latent_dim, image_shape=vae.config.image_shape)


def onnx_codec(encoder: OnnxFunction, decoder: OnnxFunction, image_shape: tuple[int, int, int]) -> Codec:
    """Return a user's pair of functions as a codec.

    The encoder's second output is sigma; without one, the posterior is a point. Raises CodecMismatch, with the shapes,
    when the pair does not fit the images.
    """

    def encode(images: Images) -> tuple[Array, Array]:
        mu, *rest = encoder(as_array(images))
        return mu, rest[0] if rest else np.zeros_like(mu)

    def decode(z: Codes) -> Array:
        return decoder(as_array(z))[0]

    mu, sigma = _run_once("encoder", encode, np.full((2, *image_shape), 0.5, np.float32))
    if mu.ndim != 2 or len(mu) != 2 or sigma.shape != mu.shape:
        raise CodecMismatch(
            f"the encoder answers mu {mu.shape} and sigma {sigma.shape} for two images of {image_shape}; both must be "
            "(n, d)"
        )
    images = _run_once("decoder", decode, mu.astype(np.float32))
    if images.shape != (2, *image_shape):
        raise CodecMismatch(f"the decoder answers {images.shape} for two latents, where {(2, *image_shape)} is needed")
    _check_pixels(images)
    # Gray lies in [0, 1] whatever the decoder's range, so other images are tried, too.
    others, _ = _run_once("encoder", encode, _other_images(image_shape))
    _check_pixels(_run_once("decoder", decode, _other_latents(others)))
    # A linear decoder's values beyond black and white cannot be stored, so the search never sees them.
    return Codec(
        encode=encode,
        decode=lambda z: np.clip(decode(z), 0, 1),
        latent_dim=mu.shape[1],
        image_shape=image_shape,
    )


def as_array(values: Array | torch.Tensor) -> Array:
    """Return an array or a tensor as an array on the host."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _other_images(image_shape: tuple[int, int, int]) -> Array:
    """Return black, white and noise images, (n, c, h, w)."""
    noise = np.random.default_rng(0).random((6, *image_shape), np.float32)
    return np.concatenate([np.zeros_like(noise[:1]), np.ones_like(noise[:1]), noise])


def _other_latents(mu: Array) -> Array:
    """Return latents of images (n, d), zero, and draws around them.

    Draws have the scale of the latents, which no convention fixes.
    """
    draws = mu.mean(axis=0) + mu.std(axis=0) * np.random.default_rng(0).standard_normal(mu.shape)
    return np.concatenate([mu, np.zeros_like(mu[:1]), draws]).astype(np.float32)


def _check_pixels(images: Array) -> None:
    outside = np.abs(images - np.clip(images, 0, 1)).mean()
    if not outside <= _OVERSHOOT:  # also false for NaN
        raise CodecMismatch(
            f"the decoder answers values from {images.min():g} to {images.max():g}; pixels must lie in [0, 1]"
        )


def _run_once(part: str, function: Callable[[Array], Any], example: Array) -> Any:
    try:
        return function(example)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        raise CodecMismatch(f"the {part} cannot take {example.dtype} {example.shape}: {error}") from error
