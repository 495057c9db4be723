"""Changes of training images that keep their labels: shifts, rotations and flips, as one affine map an image."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from services.arrays import Array

# Uniform numbers that an image takes: shift right, shift down, rotation, flip.
DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What images may undergo. What moves into view from outside repeats the border."""

    # Share of the image's side, either way.
    max_shift: float = 0.0
    # Either way.
    max_rotation_degrees: float = 0.0
    # Of half of the images.
    horizontal_flip: bool = False

    def __call__(self, images: Array, draws: Array) -> Array:
        """Return images (n, c, h, w), changed as uniform draws (n, 4) have it."""
        if not (self.max_shift or self.max_rotation_degrees or self.horizontal_flip):
            return images
        x = torch.from_numpy(np.asarray(images, np.float32))
        grid = F.affine_grid(torch.from_numpy(self._maps(draws, *images.shape[2:])), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False).numpy()

    def _maps(self, draws: Array, height: int, width: int) -> Array:
        """Return the affine maps (n, 2, 3) from the new image to the old, in [-1, 1] from border to border."""
        either_way = 2 * draws - 1
        angle = np.deg2rad(self.max_rotation_degrees) * either_way[:, 2]
        mirror = np.where(self.horizontal_flip & (draws[:, 3] < 0.5), -1.0, 1.0)
        aspect = height / width
        maps = np.empty((len(draws), 2, 3), np.float32)
        maps[:, 0, 0], maps[:, 0, 1] = mirror * np.cos(angle), -np.sin(angle) * aspect
        maps[:, 1, 0], maps[:, 1, 1] = mirror * np.sin(angle) / aspect, np.cos(angle)
        maps[:, :, 2] = -2 * self.max_shift * either_way[:, :2]
        return maps
