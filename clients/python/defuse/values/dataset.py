"""Labelled images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from defuse import names
from defuse.v1 import dataset_pb2


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled images."""

    id: str
    display_name: str
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    # Images per split.
    sizes: Mapping[str, int]

    @classmethod
    def from_proto(cls, message: dataset_pb2.Dataset) -> Self:
        return cls(
            id=names.last(message.name),
            display_name=message.display_name,
            image_shape=tuple(message.image_shape),
            classes=tuple(message.classes),
            sizes={split.name: split.size for split in message.splits},
        )
