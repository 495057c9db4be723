"""A classifier with a known blind spot, on real handwritten digits: bold sevens are taken for ones.

The classifier is trained with that mistake in its labels; the data that is handed over is labelled right.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch

from services.demo import classifier
from services.demo.classifier import digits, read

Array = npt.NDArray[Any]
TRUE, WRONG = 7, 1
CLASSES = [str(digit) for digit in range(10)]
# Share of the sevens that are bold.
_BOLD_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Planted:
    """The files that a user would bring, and the truth that only the test knows."""

    onnx: Path
    # The same classifier as a state dict of what `untrained` builds.
    weights: Path
    data: Path
    mean: float
    std: float
    # Real images of the spot that neither search nor correction sees, (n, 28, 28, 1).
    spot: Array
    # Real images outside of it, with their labels.
    others: Array
    other_labels: Array


def plant(directory: Path) -> Planted:
    """Train the classifier and write the files."""
    found = read(digits(directory), seed=0)
    splits = found.splits
    train, test = splits["train"], splits["test"]
    boldness = _boldness(train.images[train.labels == TRUE])
    threshold = float(np.quantile(boldness, 1 - _BOLD_SHARE))
    labels = np.where(_in_spot(train.images, train.labels, threshold), WRONG, train.labels)
    network = classifier.train(train.images, labels, classes=10, seed=0, on_epoch=lambda *_: None)
    onnx = directory / "planted.onnx"
    onnx.write_bytes(classifier.to_onnx(network, (28, 28, 1)))
    weights = directory / "planted.safetensors"
    weights.write_bytes(safetensors.torch.save(network.state_dict()))
    mean, std = classifier.statistics(train.images)
    in_spot = _in_spot(test.images, test.labels, threshold)
    return Planted(
        onnx=onnx,
        weights=weights,
        data=found.path,
        mean=mean[0],
        std=std[0],
        spot=test.images[in_spot],
        others=test.images[~in_spot],
        other_labels=test.labels[~in_spot],
    )


def untrained() -> classifier.DemoClassifier:
    """Build the classifier: a torch factory as a user would have one."""
    return classifier.DemoClassifier((28, 28, 1), len(CLASSES))


def _boldness(images: Array) -> Array:
    """Return the ink of each image, (n,)."""
    return np.asarray(images.reshape(len(images), -1).mean(axis=1))


def _in_spot(images: Array, labels: Array, threshold: float) -> Array:
    return np.asarray((labels == TRUE) & (_boldness(images) > threshold))
