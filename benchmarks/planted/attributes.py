"""Attributes of images that define planted spots.

Each maps images (n, h, w, c) uint8 to values (n,).
"""

from collections.abc import Callable

import numpy as np

from benchmarks.stand import Array

Attribute = Callable[[Array], Array]
_TINY = 1e-6
# Share of a side that counts as border.
_BORDER_SHARE = 1 / 8
# Share of the largest difference from the border below which a pixel is no foreground: noise has no moments.
_FLOOR_SHARE = 0.2
# A border is plain if so many of its pixels, over all images, are within so many levels of 255 of one another.
_PLAIN_SHARE, _PLAIN_LEVELS = 0.95, 8.0
# Channels that differ by fewer levels are gray.
_GRAY_LEVELS = 1.0


def brightness(images: Array) -> Array:
    return np.asarray(_gray(images).mean(axis=(1, 2)))


def colour_cast(images: Array) -> Array:
    """Return red minus the mean of the other channels, in levels."""
    means = images.mean(axis=(1, 2))  # (n, c)
    return np.asarray(means[:, 0] - means[:, 1:].mean(axis=1))


def contrast(images: Array) -> Array:
    return np.asarray(_gray(images).std(axis=(1, 2)))


def sharpness(images: Array) -> Array:
    """Return the mean absolute Laplacian, relative to the contrast."""
    x = _gray(images)
    laplacian = 4 * x[:, 1:-1, 1:-1] - x[:, :-2, 1:-1] - x[:, 2:, 1:-1] - x[:, 1:-1, :-2] - x[:, 1:-1, 2:]
    return np.asarray(np.abs(laplacian).mean(axis=(1, 2)) / (x.std(axis=(1, 2)) + 1))


def background(images: Array) -> Array:
    """Return the border's mean minus the centre's, in levels."""
    x = _gray(images)
    height, width = x.shape[1:]
    centre = x[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    return np.asarray(_border(x).mean(axis=1) - centre.mean(axis=(1, 2)))


def size(images: Array) -> Array:
    """Return the extent of the foreground, as a share of the side.

    It is the root of the second moments.
    """
    (yy, _), (xx, _) = _moments(images)
    return np.asarray(np.sqrt(yy + xx))


def slant(images: Array) -> Array:
    """Return the shift to the right for each step down.

    It is negative where the top leans right.
    """
    (yy, xy), _ = _moments(images)
    return np.asarray(xy / (yy + _TINY))


def stroke_width(images: Array) -> Array:
    """Return twice the area of the foreground over its perimeter, in pixels.

    The perimeter is the total variation, so that gray edges count as the share of a pixel that they are.
    """
    weight = _foreground(images)
    down, right = np.diff(weight, axis=1)[:, :, :-1], np.diff(weight, axis=2)[:, :-1]
    return np.asarray(2 * weight.sum(axis=(1, 2)) / (np.hypot(down, right).sum(axis=(1, 2)) + _TINY))


ATTRIBUTES: dict[str, Attribute] = {
    "brightness": brightness,
    "colour_cast": colour_cast,
    "contrast": contrast,
    "sharpness": sharpness,
    "background": background,
    "size": size,
    "slant": slant,
    "stroke_width": stroke_width,
}


def fitting_kinds(images: Array) -> list[str]:
    """Return the kinds of attributes that vary in the images.

    A colour cast needs colours. A slant and a stroke width need a foreground on a plain ground, where the ground itself
    and the sharpness of the strokes say little.
    """
    # (n, c): levels by which the channels differ from their mean
    spread = np.abs(images - images.mean(axis=-1, keepdims=True)).mean(axis=(1, 2))
    coloured = images.shape[-1] == 3 and float(spread.mean()) > _GRAY_LEVELS
    border = _border(_gray(images))
    plain = not coloured and float((np.abs(border - np.median(border)) <= _PLAIN_LEVELS).mean()) >= _PLAIN_SHARE
    left_out = {"background", "sharpness"} if plain else {"slant", "stroke_width"}
    if not coloured:
        left_out.add("colour_cast")
    return [kind for kind in ATTRIBUTES if kind not in left_out]


def _gray(images: Array) -> Array:
    return np.asarray(images.mean(axis=-1, dtype=np.float32))


def _border(gray: Array) -> Array:
    """Return the pixels near the edge, (n, m)."""
    height, width = gray.shape[1:]
    inside = np.zeros((height, width), bool)
    wide, high = max(1, int(width * _BORDER_SHARE)), max(1, int(height * _BORDER_SHARE))
    inside[high : height - high, wide : width - wide] = True
    return np.asarray(gray[:, ~inside])


def _foreground(images: Array) -> Array:
    """Return each pixel's difference from the border, in [0, 1], (n, h, w)."""
    gray = _gray(images)
    difference = np.abs(gray - np.median(_border(gray), axis=1)[:, None, None])
    largest = difference.max(axis=(1, 2), keepdims=True) + _TINY
    return np.asarray(np.clip(difference / largest - _FLOOR_SHARE, 0, None) / (1 - _FLOOR_SHARE))


def _moments(images: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return the central second moments ((yy, xy), (xx, xy)), (n,) each.

    They are in sides squared.
    """
    weight = _foreground(images)
    total = weight.sum(axis=(1, 2)) + _TINY
    height, width = weight.shape[1:]
    y, x = np.arange(height)[None, :, None] / height, np.arange(width)[None, None, :] / width
    my, mx = (weight * y).sum(axis=(1, 2)) / total, (weight * x).sum(axis=(1, 2)) / total
    dy, dx = y - my[:, None, None], x - mx[:, None, None]
    yy, xx, xy = ((weight * product).sum(axis=(1, 2)) / total for product in (dy * dy, dx * dx, dy * dx))
    return (yy, xy), (xx, xy)
