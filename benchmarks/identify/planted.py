"""Classifiers with planted blind spots: in three classes the images with most ink are labelled as another class."""

from dataclasses import dataclass

import numpy as np

from benchmarks.stand import Array, Data

# Of digits, each with what it is taken for; other data takes the classes with most images, each for the next.
_DIGITS = ((7, 1), (4, 9), (0, 6))
_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Spots:
    """Which images are in which planted spot."""

    confusions: tuple[tuple[int, int], ...]
    # Ink above which an image of the first class is in the spot.
    thresholds: tuple[float, ...]

    def labels(self, images: Array, labels: Array) -> Array:
        """Return the labels that plant the spots, (n,)."""
        planted = labels.copy()
        for (_, wrong), inside in zip(self.confusions, self.inside(images, labels), strict=True):
            planted[inside] = wrong
        return planted

    def contain(self, images: Array, labels: Array) -> Array:
        """Say which images are in a spot, (n,)."""
        return np.asarray(np.any(self.inside(images, labels), axis=0))

    def share(self, failures: dict[str, Array]) -> float:
        """Return which share of failures is of a planted confusion."""
        if not len(failures["source"]):
            return 0.0
        pairs = zip(failures["true_label"].tolist(), failures["predicted_label"].tolist(), strict=True)
        return sum(pair in self.confusions for pair in pairs) / len(failures["source"])

    def inside(self, images: Array, labels: Array) -> list[Array]:
        """Say for each spot which images are in it, (n,) each."""
        ink = _ink(images)
        return [
            (labels == true) & (ink > threshold)
            for (true, _), threshold in zip(self.confusions, self.thresholds, strict=True)
        ]


def plant(data: Data) -> Spots:
    """Choose three spots in the training images."""
    images, labels = data.images["train"], data.labels["train"]
    confusions = _DIGITS if data.classes == 10 else _largest(labels)
    ink = _ink(images)
    thresholds = tuple(float(np.quantile(ink[labels == true], 1 - _SHARE)) for true, _ in confusions)
    return Spots(confusions=tuple(confusions), thresholds=thresholds)


def _largest(labels: Array) -> tuple[tuple[int, int], ...]:
    order = np.argsort(-np.bincount(labels))[:6].tolist()
    return tuple(zip(order[::2], order[1::2], strict=True))


def _ink(images: Array) -> Array:
    return np.asarray(images.reshape(len(images), -1).mean(axis=1))
