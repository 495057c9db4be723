"""A small convolutional variational autoencoder, and its files.

The files are safetensors weights, and encoder and decoder as ONNX. The model is that of Kingma & Welling 2014,
"Auto-Encoding Variational Bayes" (arXiv:1312.6114), with the KL weight `beta` of Higgins et al. 2017. The Gaussian
likelihood of colour images, whose variance follows the error, is the optimal sigma-VAE of Rybkin et al. 2021
(arXiv:2006.13202), with a variance for each image. The figures behind the defaults are in docs/explanation/method.md.
"""

import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.arrays import read_safetensors_header
from services.latent_space.rendering import Resize, limited_size
from services.onnx_graph.onnx_files import to_onnx

_LOG_SIGMA_RANGE = (-6.0, 3.0)  # keeps sigma and the KL finite, far outside the range of trained encoders

_RANGES = {
    "latent_dim": (1, 512),
    "width": (8, 256),
    "epochs": (1, 10_000),
    "batch_size": (1, 8192),
    "max_shift": (0, 8),
    "max_side": (8, 128),
}
MAX_SIDE = 64
"""Default largest side of the copies: the rendering `residual` takes fine detail from the source image."""
_LIKELIHOODS = ("bernoulli", "gaussian")
_RANGES_REAL = {"learning_rate": (1e-6, 0.1), "beta": (0.0, 100.0)}


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The architecture and schedule of one VAE.

    `image_shape` is (channels, height, width) in pixels; `width` is the number of channels at half resolution of a
    32-pixel image; `beta` is the weight of the KL in nats; `likelihood` is that of the pixels, bernoulli or gaussian;
    `max_shift` is the largest random shift of training images in pixels; `max_side` is the largest side in pixels of
    the copies on which the networks work. Raises ValueError with the field, its value and the range.
    """

    image_shape: tuple[int, int, int]
    latent_dim: int
    width: int = 32
    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    beta: float = 0.2
    likelihood: str = "bernoulli"  # the default of files that were written before there was a choice
    max_shift: int = 0
    max_side: int = 128  # of files that were written before there was a choice

    def __post_init__(self) -> None:
        _check_shape(self.image_shape)
        for name, (low, high) in (_RANGES | _RANGES_REAL).items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {value}: choose a value from {low:g} to {high:g}")
        if self.likelihood not in _LIKELIHOODS:
            raise ValueError(f"likelihood is {self.likelihood!r}: choose one of {', '.join(_LIKELIHOODS)}")
        if self.width % 8:
            raise ValueError(f"width is {self.width}: choose a multiple of 8, deeper images halve it")

    @classmethod
    def for_shape(cls, image_shape: tuple[int, int, int], n_images: int, **overrides: Any) -> Self:
        """Return architecture and schedule for `n_images` images (c, h, w).

        `overrides` replace single fields.
        """
        _check_shape(image_shape)
        if n_images < 1:
            raise ValueError(f"n_images is {n_images}: a VAE needs at least one image")
        c = image_shape[0]
        h, w = limited_size(*image_shape[1:], overrides.get("max_side", MAX_SIDE))
        defaults = _colour_defaults(3 * h * w, n_images) if c == 3 else _gray_defaults(h * w, n_images)
        return cls(image_shape=image_shape, **defaults | {"max_side": MAX_SIDE} | overrides)

    @property
    def copy_size(self) -> tuple[int, int]:
        """Return height and width of the copies on which the networks work."""
        return limited_size(*self.image_shape[1:], self.max_side)

    @property
    def levels(self) -> int:
        """Return the number of halvings, to at most 8 pixels a side."""
        return max(2, math.ceil(math.log2(max(self.copy_size) / 8)))


def _gray_defaults(n_pixels: int, n_images: int) -> dict[str, Any]:
    epochs = min(200, 5 + 90_000 // n_images)  # small data sets need steps: 35 epochs of 3,000 images, 6 of 50,000
    return {"latent_dim": min(32, n_pixels // 16), "epochs": epochs, "beta": 0.2}


def _colour_defaults(n_values: int, n_images: int) -> dict[str, Any]:
    """Return the defaults for photographs, which vary more than digits.

    They have more dimensions, more steps, and a variance for each image, since lighting varies as well. The steps are
    those that the rendering `residual` needs, which takes detail from the source image.
    """
    epochs = min(70, 5 + 200_000 // n_images)  # 70 epochs of 3,000 images, 9 of 50,000
    schedule = {"epochs": epochs, "learning_rate": 4e-3, "max_shift": 1}
    return {"latent_dim": min(128, n_values // 16), "beta": 1.0, "likelihood": "gaussian"} | schedule


def _check_shape(image_shape: tuple[int, int, int]) -> None:
    if len(image_shape) != 3 or image_shape[0] not in {1, 3}:
        raise ValueError(f"image_shape is {image_shape}: give (channels, height, width) with 1 or 3 channels")
    if not all(8 <= side <= 512 for side in image_shape[1:]):
        raise ValueError(f"image_shape is {image_shape}: resize to 8..512 pixels each side")


class Vae(nn.Module):
    """A VAE: encoder q(z|x), and decoder p(x|z) around the decoded image.

    q(z|x) is N(mu, diag(sigma^2)), and the prior is N(0, I). The networks work on copies of at most `max_side` pixels,
    which are enlarged bilinearly. Copies are padded to a multiple of 2^levels by repeating the last row and column, and
    cropped on output. `new_vae` gives seeded weights; the constructor alone gives torch's own.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        c, size = config.image_shape[0], config.image_shape[1:]
        h, w = config.copy_size
        self.reduce, self.enlarge = Resize(size, (h, w)), Resize((h, w), size)
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
        return self.encode_copies(self.reduce(images))

    def encode_copies(self, copies: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma (n, d) of copies (n, c, h', w') in [0, 1]."""
        h, w = self.config.copy_size
        below, right = self.grid[0] * 2**self.config.levels - h, self.grid[1] * 2**self.config.levels - w
        padded = F.pad(copies, (0, right, 0, below), mode="replicate") if below or right else copies  # (n, c, H, W)
        mu, log_sigma = self.encoder(padded).chunk(2, dim=1)  # (n, 2d) -> 2 x (n, d)
        return mu, log_sigma.clamp(*_LOG_SIGMA_RANGE).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Return images (n, c, h, w) in [0, 1] of latents z (n, d)."""
        parameters = self.decode_parameters(z)
        bernoulli = self.config.likelihood == "bernoulli"
        images: Tensor = self.enlarge(parameters.sigmoid() if bernoulli else gaussian_means(parameters).clamp(0, 1))
        return images

    def decode_parameters(self, z: Tensor) -> Tensor:
        """Return the parameters (n, c, h', w') of the distributions of a copy's pixels.

        They are logits of Bernoulli pixels, or the argument of `gaussian_means`.
        """
        h, w = self.config.copy_size
        parameters: Tensor = self.decoder(z)  # (n, c, H, W)
        return parameters[:, :, :h, :w]  # (n, c, h', w')


def gaussian_means(parameters: Tensor) -> Tensor:
    """Return the means of Gaussian pixels, which may lie outside [0, 1].

    The map is linear, because a sigmoid under a squared error has no gradient where it is wrong by the whole range, and
    half-trained weights stay there. A quarter is the sigmoid's slope at gray, so that new weights begin alike with
    either likelihood.
    """
    return 0.5 + 0.25 * parameters


class _Residual(nn.Module):
    """A pre-activation residual block (He et al. 2016, arXiv:1603.05027).

    It is the identity when new.
    """

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
    """Yield layers that double the grid by sub-pixel convolution.

    They need no full-size feature maps (Shi et al. 2016, arXiv:1609.05158).
    """
    for outputs, inputs in reversed(list(itertools.pairwise([channels, *widths]))):
        yield nn.SiLU()
        yield nn.Conv2d(inputs, 4 * outputs, 3, padding=1)
        yield nn.PixelShuffle(2)  # (n, 4o, H, W) -> (n, o, 2H, 2W)


def _widths(config: VaeConfig) -> list[int]:
    """Return the number of channels of each level, shallow to deep.

    It is halved when the grid doubles, so that levels cost about the same.
    """
    return [max(8, config.width * 2 // 2**depth) for depth in reversed(range(config.levels))]


def new_vae(config: VaeConfig, generator: torch.Generator) -> Vae:
    """Return a Vae on the CPU with weights drawn from `generator` only.

    The global generator is not used.
    """
    vae = empty_vae(config).to_empty(device="cpu")
    for name, parameter in vae.named_parameters():
        is_zero = name.endswith(("bias", "last.weight"))  # residual blocks begin as the identity
        bound = 0.0 if is_zero else 1 / math.sqrt(parameter[0].numel())  # one over the root of the fan-in
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return vae


def empty_vae(config: VaeConfig) -> Vae:
    with torch.device("meta"):  # allocates no memory, and draws nothing from the global generator
        return Vae(config)


def check_images(images: npt.NDArray[np.uint8], config: VaeConfig) -> None:
    c, h, w = config.image_shape
    if images.dtype != np.uint8 or images.shape[1:] != (h, w, c) or not len(images):
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 (n, {h}, {w}, {c}) with n > 0")


def to_tensor(images: npt.NDArray[np.uint8], device: torch.device | str) -> Tensor:
    pixels = torch.from_numpy(np.array(images)).to(device)  # a copy: torch warns of read-only arrays
    return pixels.permute(0, 3, 1, 2).float().contiguous() / 255  # (n, h, w, c) -> (n, c, h, w)


def to_bytes(vae: Vae) -> bytes:
    """Return weights and config as one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    data: bytes = safetensors.torch.save(tensors, metadata={"vae": json.dumps(asdict(vae.config))})
    return data


def from_bytes(data: bytes) -> Vae:
    """Return the Vae of a file of `to_bytes`.

    It is on the CPU, in eval mode. Raises ValueError for any other file.
    """
    try:
        header, _ = read_safetensors_header(io.BytesIO(data))
        fields = json.loads(header["__metadata__"]["vae"])
        vae = empty_vae(VaeConfig(**fields | {"image_shape": tuple(fields["image_shape"])}))
        vae.load_state_dict(safetensors.torch.load(data), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"these {len(data)} bytes are no VAE file ({error}): write one with to_bytes") from error
    return vae.eval()


def encoder_onnx(vae: Vae) -> bytes:
    """Return an ONNX model of the encoder, for any n.

    It maps images (n, c, h, w) in [0, 1] to mu and sigma (n, d).
    """
    return to_onnx(_Half(vae, vae.encode), vae.config.image_shape, inputs=["images"], outputs=["mu", "sigma"])


def decoder_onnx(vae: Vae) -> bytes:
    """Return an ONNX model of the decoder, for any n.

    It maps z (n, d) to images (n, c, h, w) in [0, 1].
    """
    return to_onnx(_Half(vae, vae.decode), (vae.config.latent_dim,), inputs=["z"], outputs=["images"])


class _Half(nn.Module):
    """One direction of a Vae as a module for the exporter."""

    def __init__(self, vae: Vae, direction: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.vae, self.direction = vae, direction

    def forward(self, x: Tensor) -> Any:
        return self.direction(x)
