"""Planted spots: their choice by seed, and their hidden images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from benchmarks.planted.attributes import ATTRIBUTES, fitting_kinds
from benchmarks.stand import Array, Data

OCCLUSION, SUB_TYPE = "occlusion", "sub_type"
# Kinds that are planted on demand only. A search cannot be expected to find them: no handed-over image has the bar, and
# no attribute names the sub-type.
REPORTED_KINDS = (OCCLUSION, SUB_TYPE)
KINDS = (*ATTRIBUTES, *REPORTED_KINDS)
SPOTS = 3
# Share of a class that is in its spot.
_SHARE = 0.3
# Where ties or another split give another share, the attribute does not cut the class.
_LEAST_SHARE, _LARGEST_SHARE = 0.1, 0.5
# Real images with which a spot's accuracy is told to about 15 points. The classifier is given as many at least to learn
# the spot from: it would learn fewer by heart.
LEAST_IMAGES = 40
SCORED_SPLITS = ("val", "test")
_SUB_TYPES = 3
# Width of a bar, as a share of the side.
_BAR_SHARE = 1 / 5


@dataclass(frozen=True, kw_only=True)
class PlantedSpot:
    """A sub-population of a class that the classifier gets wrong."""

    kind: str
    # Whether the spot has the images above the threshold, or those below.
    above: bool
    threshold: float
    true_label: int
    wrong_label: int
    # Split to whether each of its images is in the spot, (n,) bool.
    members: dict[str, Array]

    @property
    def confusion(self) -> tuple[int, int]:
        return self.true_label, self.wrong_label

    @property
    def scored(self) -> int:
        """Return how many real images it is scored on."""
        return sum(int(self.members[split].sum()) for split in SCORED_SPLITS)


@dataclass(frozen=True, kw_only=True)
class SpotPlan:
    """Planted spots, and the images with them."""

    # All images, those of the spots included.
    data: Data
    spots: tuple[PlantedSpot, ...]
    # Why there are fewer spots than wanted; empty otherwise.
    shortfall: str = ""

    def hidden(self, split: str) -> Array:
        """Say which images of a split are in a spot, (n,)."""
        return np.asarray(np.any([spot.members[split] for spot in self.spots], axis=0))

    def handed_over(self) -> Data:
        """Return the data without the images of the spots."""
        kept = {split: ~self.hidden(split) for split in self.data.images}
        return replace(
            self.data,
            images={split: images[kept[split]] for split, images in self.data.images.items()},
            labels={split: labels[kept[split]] for split, labels in self.data.labels.items()},
        )

    def mislabelled(self) -> tuple[Array, Array]:
        """Return all training images, and their labels with the spots' wrong ones."""
        labels = self.data.labels["train"].copy()
        for spot in self.spots:
            labels[spot.members["train"]] = spot.wrong_label
        return self.data.images["train"], labels

    def scored_images(self, spot: PlantedSpot) -> Array:
        """Return the real images (n, h, w, c) that score a spot."""
        return np.concatenate([self.data.images[split][spot.members[split]] for split in SCORED_SPLITS])


def plan_spots(
    data: Data,
    *,
    seed: int,
    features: Callable[[Array], Array],
    kinds: Sequence[str] = (),
    least: int = LEAST_IMAGES,
) -> SpotPlan:
    """Choose spots of different classes and kinds, by seed.

    `features` maps images to the penultimate features of an independent network, for sub-types. A spot that has fewer
    than `least` images for training or for scoring, or no wrong label that is large enough, is not planted: the next
    class is tried, then the next kind.
    """
    random = np.random.default_rng(seed)
    wanted = random.permutation(np.array(kinds or fitting_kinds(data.images["train"])))
    spots: list[PlantedSpot] = []
    for kind in map(str, wanted):
        if len(spots) == SPOTS:
            break
        chooser = _Chooser(data, random, features, least)
        taken = {spot.true_label for spot in spots}
        for label in random.permutation(data.classes).tolist():
            found = None if label in taken else chooser.spot(kind, label)
            if found:
                spots.append(found)
                data = _with_bars(data, found, random) if kind == OCCLUSION else data
                break
    shortfall = (
        f"{len(spots)} of {SPOTS} spots: no further class has {least} images to learn from and {least} to be scored on"
    )
    return SpotPlan(data=data, spots=tuple(spots), shortfall="" if len(spots) == SPOTS else shortfall)


class _Chooser:
    """Tries classes for one kind."""

    def __init__(self, data: Data, random: np.random.Generator, features: Callable[[Array], Array], least: int) -> None:
        self._data, self._random, self._features, self._least = data, random, features, least

    def spot(self, kind: str, label: int) -> PlantedSpot | None:
        """Return the spot of a kind in a class.

        It is None where the class does not suit.
        """
        rows = {split: np.flatnonzero(labels == label) for split, labels in self._data.labels.items()}
        # Every try draws the same numbers, whatever comes of it.
        above, draw = bool(self._random.integers(2)), int(self._random.integers(1 << 31))
        if sum(len(rows[split]) for split in SCORED_SPLITS) < self._least or len(rows["train"]) < _SUB_TYPES:
            return None
        values = self._values(kind, rows, draw)
        above = above or kind in REPORTED_KINDS
        threshold = 0.0 if kind == SUB_TYPE else float(np.quantile(values["train"], 1 - _SHARE if above else _SHARE))
        members = {}
        for split, labels in self._data.labels.items():
            members[split] = np.zeros(len(labels), bool)
            inside = values[split] > threshold if above else values[split] < threshold
            members[split][rows[split][inside]] = True
        wrong = self._wrong_label(label, members["train"], draw)
        if wrong is None or not _LEAST_SHARE <= members["train"].sum() / len(rows["train"]) <= _LARGEST_SHARE:
            return None
        found = PlantedSpot(
            kind=kind, above=above, threshold=threshold, true_label=label, wrong_label=wrong, members=members
        )
        return found if min(found.scored, members["train"].sum()) >= self._least else None

    def _values(self, kind: str, rows: dict[str, Array], draw: int) -> dict[str, Array]:
        """Return what the threshold cuts, for the class's images of each split."""
        images = {split: self._data.images[split][where] for split, where in rows.items()}
        if kind == OCCLUSION:
            random = np.random.default_rng(draw)
            return {split: random.random(len(part)) for split, part in images.items()}
        if kind == SUB_TYPE:
            return self._sub_type(images, draw)
        return {split: ATTRIBUTES[kind](part) if len(part) else np.zeros(0) for split, part in images.items()}

    def _sub_type(self, images: dict[str, Array], draw: int) -> dict[str, Array]:
        """Return by how much one cluster is nearer than the others."""
        features = {split: self._features(part) for split, part in images.items()}
        clusters = KMeans(_SUB_TYPES, n_init=3, random_state=draw).fit(features["train"])
        chosen = draw % _SUB_TYPES
        values = {}
        for split, part in features.items():
            distances = clusters.transform(part) if len(part) else np.zeros((0, _SUB_TYPES))
            values[split] = np.delete(distances, chosen, axis=1).min(axis=1) - distances[:, chosen]
        return values

    def _wrong_label(self, label: int, inside: Array, draw: int) -> int | None:
        """Return another class with as many training images as the spot."""
        counts = np.bincount(self._data.labels["train"], minlength=self._data.classes)
        large = [other for other in np.flatnonzero(counts >= max(1, inside.sum())).tolist() if other != label]
        return large[draw % len(large)] if large else None


def _with_bars(data: Data, spot: PlantedSpot, random: np.random.Generator) -> Data:
    """Return the data with a bar over every image of a spot."""
    images: dict[str, Any] = {}
    for split, whole in data.images.items():
        images[split] = whole.copy()
        for row in np.flatnonzero(spot.members[split]):
            images[split][row] = _barred(whole[row], random)
    return replace(data, images=images)


def _barred(image: Array, random: np.random.Generator) -> Array:
    """Return an image (h, w, c) with an upright or a lying bar.

    The bar is light on dark images and dark on light ones.
    """
    barred = image.copy()
    view = barred if random.integers(2) else barred.swapaxes(0, 1)
    thickness = max(1, int(len(view) * _BAR_SHARE))
    begin = int(random.integers(len(view) - thickness + 1))
    view[begin : begin + thickness] = 255 if image.mean() < 128 else 0
    return barred
