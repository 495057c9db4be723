import hashlib
import io
import tracemalloc
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import dataset_pb2
from PIL import Image

from services.gateway.datasets.datasets import Datasets
from services.gateway.files.files import Files
from services.storage import keys
from services.storage.artifacts import ArtifactStore

Array = npt.NDArray[Any]
MEBIBYTE = 1 << 20


@pytest.fixture
def datasets(store: ArtifactStore) -> Datasets:
    return Datasets(store, Files(store, max_bytes=10**7), max_bytes=10**7)


def upload(store: ArtifactStore, count: int = 40, **more: Any) -> str:
    """Store an `.npz` of `count` training images whose pixel is their number; return its digest."""
    images = np.tile(np.arange(count, dtype=np.uint8)[:, None, None], (1, 8, 10))
    buffer = io.BytesIO()
    np.savez(buffer, x_train=images, y_train=np.arange(count) % 3, **more)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    store.write_bytes(keys.file(digest), buffer.getvalue())
    return digest


def create(datasets: Datasets, digest: str, seed: int = 0) -> dataset_pb2.Dataset:
    return datasets.create(file_digest=digest, uri="", display_name="planted", seed=seed)


def test_a_data_set_says_what_it_holds(datasets: Datasets, store: ArtifactStore) -> None:
    """The record has shape, labels, splits and their origin; the arrays lie in the store."""
    dataset = create(datasets, upload(store, class_names=["ant", "bee", "cat"]))
    assert (list(dataset.image_shape), dataset.label_count) == ([8, 10, 1], 3)
    assert (list(dataset.classes), dataset.display_name) == (["ant", "bee", "cat"], "planted")
    assert [(split.name, split.size, split.cut_by_seed) for split in dataset.splits] == [
        ("train", 24, False),
        ("val", 8, True),
        ("test", 8, True),
    ]
    pixels = []
    for split in dataset.splits:
        arrays = store.read_arrays(keys.split(dataset.name, split.name))
        np.testing.assert_array_equal(arrays["y"], arrays["x"][:, 0, 0, 0] % 3)
        pixels += list(arrays["x"][:, 0, 0, 0])
    assert sorted(pixels) == list(range(40))


def test_the_same_content_and_seed_are_the_same_data_set(datasets: Datasets, store: ArtifactStore) -> None:
    """A data set is named by its content and its seed."""
    digest = upload(store)
    first = create(datasets, digest)
    assert create(datasets, digest) == first
    names = {first.name, create(datasets, digest, seed=1).name, create(datasets, upload(store, count=50)).name}
    assert len(names) == 3


def test_a_data_set_that_was_half_written_is_written_again(datasets: Datasets, store: ArtifactStore) -> None:
    """A process that died among the splits leaves no data set; the next one makes it whole."""
    digest = upload(store)
    name = create(datasets, digest).name
    store._fs.rm(f"{store._root}/{keys.dataset(name)}")
    store._fs.rm(f"{store._root}/{keys.split(name, 'test')}")
    assert create(datasets, digest).name == name
    assert len(store.read_arrays(keys.split(name, "test"))["y"]) == 8


@pytest.mark.parametrize(("digest", "uri"), [("", ""), ("a" * 64, "s3://bucket/images.zip")])
def test_either_a_file_or_a_url(digest: str, uri: str, datasets: Datasets) -> None:
    """Neither, or both, are refused."""
    with pytest.raises(InvalidInput, match="either"):
        datasets.create(file_digest=digest, uri=uri, display_name="", seed=0)


@pytest.mark.parametrize("uri", ["/etc/passwd", "file:///etc/passwd", "local://etc/passwd", "simplecache::s3://a/b"])
def test_files_of_the_server_are_not_read(uri: str, datasets: Datasets) -> None:
    """A caller cannot name a file on the server's disk."""
    with pytest.raises(InvalidInput, match="upload local files"):
        datasets.create(file_digest="", uri=uri, display_name="", seed=0)


def test_a_file_that_was_not_uploaded(datasets: Datasets) -> None:
    """A digest without a file is named."""
    with pytest.raises(NotFound, match="aaaa"):
        create(datasets, "a" * 64)


def test_data_that_is_refused_leaves_no_data_set(datasets: Datasets, store: ArtifactStore) -> None:
    """A file with bad data is refused every time."""
    digest = hashlib.sha256(b"no archive").hexdigest()
    store.write_bytes(keys.file(digest), b"no archive")
    for _ in range(2):
        with pytest.raises(InvalidInput, match="npz"):
            create(datasets, digest)
    assert store.keys("datasets") == []


def random_images(count: int, *shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def bring(store: ArtifactStore, write: Callable[..., None], images: Array, labels: Array) -> str:
    """Put a file of images and labels where an upload lies; return its digest."""
    buffer = io.BytesIO()
    write(buffer, images, labels)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    store.write_bytes(keys.file(digest), buffer.getvalue())
    return digest


def npz(file: Any, images: Array, labels: Array) -> None:
    np.savez(file, x_train=images, y_train=labels)


def compressed_npz(file: Any, images: Array, labels: Array) -> None:
    np.savez_compressed(file, x_train=images, y_train=labels)


def npz_by_columns(file: Any, images: Array, labels: Array) -> None:
    np.savez_compressed(file, x_train=np.asfortranarray(images), y_train=labels)


def zipped_folders(file: Any, images: Array, labels: Array) -> None:
    """Write bitmaps in folders named by label, in an order of names that is that of the images."""
    with zipfile.ZipFile(file, "w") as archive:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            with archive.open(f"{label}/{number:05d}.bmp", "w") as member:
                Image.fromarray(image).save(member, "BMP")


@pytest.mark.parametrize("write", [npz, compressed_npz, npz_by_columns, zipped_folders])
@pytest.mark.parametrize("seed", [0, 3])
def test_splits_are_cut_and_stored_to_the_byte(
    datasets: Datasets, store: ArtifactStore, write: Callable[..., None], seed: int
) -> None:
    """Of images in several parts, each split holds those that the seed's permutation gives it, as one array."""
    images, labels = random_images(1203, 30, 32, 3), np.arange(1203) * 3 // 1203
    name = create(datasets, bring(store, write, images, labels), seed).name
    order = np.random.default_rng(seed).permutation(1203)
    for split, rows in {"val": order[:240], "test": order[240:480], "train": order[480:]}.items():
        expected = {"x": images[np.sort(rows)], "y": labels[np.sort(rows)]}
        assert store.read_bytes(keys.split(name, split)) == safetensors.numpy.save(expected)


@pytest.mark.parametrize("write", [npz, compressed_npz, npz_by_columns, zipped_folders])
def test_images_are_never_in_memory_as_a_whole(
    datasets: Datasets, store: ArtifactStore, write: Callable[..., None]
) -> None:
    """A data set of 64 MiB is made in a fraction of that."""
    count = 64 * MEBIBYTE // (64 * 64 * 3)
    digest = bring(store, write, random_images(count, 64, 64, 3), np.arange(count) * 3 // count)
    tracemalloc.start()
    try:
        create(datasets, digest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MEBIBYTE


def test_a_damaged_file_leaves_nothing(datasets: Datasets, store: ArtifactStore) -> None:
    """A fault of the last image of the last split is found before the first split is stored."""
    buffer = io.BytesIO()
    images = random_images(40, 8, 8)
    np.savez(buffer, x_train=images, y_train=np.zeros(40, int), x_test=images + 1, y_test=np.zeros(40, int))
    content = buffer.getvalue().replace((images + 1)[-1].tobytes(), bytes(64))
    digest = hashlib.sha256(content).hexdigest()
    store.write_bytes(keys.file(digest), content)
    with pytest.raises(InvalidInput, match=r"'x_test\.npy' cannot be read"):
        create(datasets, digest)
    assert store.keys("datasets") == []
