"""Images with two planted factors, and a VAE small enough to train on them in seconds."""

from typing import Any

import numpy as np
import numpy.typing as npt

from services.generator.vae import VaeConfig


def bars(n: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Plant two factors: the height and the brightness of a bar; uint8 images (n, 12, 10, 1)."""
    random = np.random.default_rng(seed)
    top, brightness = random.integers(0, 9, n), random.uniform(80, 255, n)
    rows = np.arange(12)[None]  # (1, 12)
    inside = (rows >= top[:, None]) & (rows < top[:, None] + 3)  # (n, 12)
    column = (inside * brightness[:, None]).astype(np.uint8)  # (n, 12)
    return np.repeat(column[:, :, None], 10, axis=2)[..., None]  # (n, 12, 10, 1)


def config_for(shape: tuple[int, int, int] = (1, 12, 10), **overrides: Any) -> VaeConfig:
    small: dict[str, Any] = {"latent_dim": 4, "width": 16, "epochs": 3, "batch_size": 32}
    return VaeConfig.for_shape(shape, 3000, **small | overrides)
