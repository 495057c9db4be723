"""Data sets from files and URLs, identified by content and seed."""

import hashlib
from typing import IO

import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import dataset_pb2

from services.datasets import SPLITS, ParsedImages, SplitImages, parse_images
from services.gateway.datasets.urls import downloaded
from services.gateway.files.files import Files
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.storage.safetensors import StreamedArray


class Datasets:
    """Creates data sets from uploaded files and URLs."""

    def __init__(self, store: ArtifactStore, files: Files, *, max_bytes: int) -> None:
        self._store = store
        self._files = files
        self._max_bytes = max_bytes

    def create(self, *, file_digest: str, uri: str, display_name: str, seed: int) -> dataset_pb2.Dataset:
        """Return the data set of an uploaded file or a URL.

        The same content and seed give the same data set.
        """
        if bool(file_digest) == bool(uri):
            raise InvalidInput("give either the digest of an uploaded file or a URL", reason="BAD_DATASET", field="uri")
        if uri:
            with downloaded(uri, max_bytes=self._max_bytes) as (file, digest):
                return self._create(file, digest, display_name or uri, seed)
        self._files.size(file_digest)
        with self._store.open(keys.file(file_digest)) as file:
            return self._create(file, file_digest, display_name, seed)

    def _create(self, file: IO[bytes], digest: str, display_name: str, seed: int) -> dataset_pb2.Dataset:
        name = names.dataset(hashlib.sha256(f"{digest}:{seed}".encode()).hexdigest()[:16])
        if not self._store.exists(keys.dataset(name)):
            parsed = parse_images(file, seed=seed)
            for split in SPLITS:
                self._store.write_streamed(keys.split(name, split), _arrays(parsed.splits[split]))
            # Written last: a data set with a record is complete.
            self._store.write_message(keys.dataset(name), _record(name, display_name, parsed))
        return Catalog(self._store).dataset(name)


def _arrays(split: SplitImages) -> dict[str, StreamedArray]:
    shape = (len(split.labels), *split.image_shape)
    return {
        "x": StreamedArray(shape=shape, dtype=np.uint8, parts=split.parts()),
        "y": StreamedArray.whole(split.labels),
    }


def _record(name: str, display_name: str, parsed: ParsedImages) -> dataset_pb2.Dataset:
    record = dataset_pb2.Dataset(
        name=name,
        display_name=display_name,
        image_shape=parsed.splits["train"].image_shape,
        classes=parsed.classes,
        label_count=1 + max(int(split.labels.max()) for split in parsed.splits.values()),
        splits=[
            dataset_pb2.Split(name=split, size=len(images.labels), cut_by_seed=images.cut_by_seed)
            for split, images in parsed.splits.items()
        ],
    )
    record.create_time.GetCurrentTime()
    return record
