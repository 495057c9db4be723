import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from defuse.errors import InvalidInput
from PIL import Image

from services.datasets import SPLITS, ParsedImages, parse_images

Array = npt.NDArray[Any]


def numbered(count: int, height: int = 8, width: int = 10) -> Array:
    """Return gray images (n, h, w) whose every pixel is their number."""
    return np.tile(np.arange(count, dtype=np.uint8)[:, None, None], (1, height, width))


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def png(value: int, mode: str = "L", size: tuple[int, int] = (10, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def folders(prefix: str = "", count: int = 10) -> dict[str, bytes]:
    """Plant `count` cats of value 1 and `count` ants of value 2."""
    return {
        f"{prefix}{name}/{number:03d}.png": png(value)
        for name, value in (("cat", 1), ("ant", 2))
        for number in range(count)
    }


def parse(file: bytes, seed: int = 0) -> ParsedImages:
    return parse_images(io.BytesIO(file), seed=seed)


def refused(file: bytes, reason: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse(file)
    assert caught.value.reason == reason
    return caught.value.message


def test_npz_with_all_splits() -> None:
    """Splits that are there are taken as they are, gray images get their channel, and nothing is cut."""
    labels = {"y_train": np.arange(5), "y_val": [2, 1, 0], "y_test": [1, 1]}
    parsed = parse(npz(x_train=numbered(5), x_val=numbered(3), x_test=numbered(2), **labels))
    assert [(name, split.cut_by_seed) for name, split in parsed.splits.items()] == [(name, False) for name in SPLITS]
    assert parsed.splits["train"].images.shape == (5, 8, 10, 1)
    np.testing.assert_array_equal(parsed.splits["val"].labels, [2, 1, 0])
    np.testing.assert_array_equal(parsed.splits["test"].images[:, 0, 0, 0], [0, 1])
    assert list(parsed.classes) == []


@pytest.mark.parametrize("alias", ["valid", "validation"])
def test_other_names_of_the_validation_split(alias: str) -> None:
    """`valid` and `validation` mean `val`."""
    named = {f"x_{alias}": numbered(3), f"y_{alias}": [0, 0, 0]}
    splits = parse(npz(x_train=numbered(10), y_train=np.zeros(10, int), **named)).splits
    assert (len(splits["val"].labels), splits["val"].cut_by_seed, splits["test"].cut_by_seed) == (3, False, True)


@pytest.mark.parametrize(("one", "other"), [("val", "valid"), ("valid", "validation")])
def test_a_split_that_is_there_twice(one: str, other: str) -> None:
    """Two arrays that mean one split are refused, both by name: neither wins over the other."""
    arrays = {f"{kind}_{split}": numbered(9) for kind in "xy" for split in ("train", one, other)}
    assert f"x_{one} and x_{other}," in refused(npz(**arrays), "BAD_DATASET")


def test_colour_and_class_names() -> None:
    """Three channels stay, and class names come in the order of the labels."""
    images = np.random.default_rng(0).integers(0, 256, (10, 9, 8, 3), dtype=np.uint8)
    parsed = parse(npz(x_train=images, y_train=np.arange(10) % 2, class_names=["cat", "ant"]))
    assert parsed.splits["train"].images.shape[1:] == (9, 8, 3)
    assert list(parsed.classes) == ["cat", "ant"]


def test_missing_splits_are_cut_by_seed_without_loss() -> None:
    """Each missing split is a fifth of the training images; none is lost, none is in two, each keeps its label."""
    parsed = parse(npz(x_train=numbered(50), y_train=np.arange(50) % 7))
    assert {name: len(split.labels) for name, split in parsed.splits.items()} == {"train": 30, "val": 10, "test": 10}
    assert [split.cut_by_seed for split in parsed.splits.values()] == [False, True, True]
    numbers = [split.images[:, 0, 0, 0] for split in parsed.splits.values()]
    assert sorted(np.concatenate(numbers)) == list(range(50))
    for number, split in zip(numbers, parsed.splits.values(), strict=True):
        np.testing.assert_array_equal(split.labels, number % 7)


def test_the_cut_depends_on_the_seed_alone() -> None:
    """The same seed cuts the same images, another seed others."""
    file = npz(x_train=numbered(50), y_train=np.zeros(50, int))
    first, second, other = (parse(file, seed).splits["val"].images for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_too_few_images_to_cut_from() -> None:
    """A split that would come out empty is refused, with how many images there are."""
    assert "4 training images" in refused(npz(x_train=numbered(4), y_train=np.zeros(4, int)), "EMPTY_SPLIT")


def test_no_training_images() -> None:
    """Data without training images is refused with the splits that it has."""
    assert "test" in refused(npz(x_test=numbered(4), y_test=np.zeros(4, int)), "EMPTY_SPLIT")


def test_an_empty_split() -> None:
    """A split that is there and empty is refused by name."""
    file = npz(x_train=numbered(9), y_train=np.zeros(9, int), x_val=numbered(0), y_val=np.zeros(0, int))
    assert "'val'" in refused(file, "EMPTY_SPLIT")


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (np.full(10, -1), "-1"),
        (np.full(10, 0.5), "float64"),
        (np.zeros(9, int), "(9,)"),
        (np.zeros((10, 2), int), "(10, 2)"),
        (np.array(["cat"] * 10), "<U3"),
    ],
)
def test_bad_labels(labels: Array, word: str) -> None:
    """Labels are one whole number from 0 upwards for each image; anything else is refused with what it is."""
    assert word in refused(npz(x_train=numbered(10), y_train=labels), "BAD_DATASET")


def test_missing_labels() -> None:
    """Images without labels are refused by the name that is missing."""
    assert "y_train" in refused(npz(x_train=numbered(10)), "BAD_DATASET")


def test_labels_beyond_the_class_names() -> None:
    """A label without a class name is refused, before something looks its name up."""
    file = npz(x_train=numbered(10), y_train=np.arange(10) % 3, class_names=["cat", "ant"])
    with pytest.raises(InvalidInput, match="2"):
        parse(file)


@pytest.mark.parametrize("images", [numbered(10).astype(np.float32), np.zeros((10, 8), np.uint8)])
def test_bad_images(images: Array) -> None:
    """Images are bytes of three or four dimensions; anything else is refused with what it is."""
    assert str(images.dtype) in refused(npz(x_train=images, y_train=np.zeros(10, int)), "BAD_DATASET")


@pytest.mark.parametrize("shape", [(7, 8, 1), (8, 129, 1), (8, 8, 2), (8, 8, 4)])
def test_shapes_that_are_not_supported(shape: tuple[int, ...]) -> None:
    """Sides of 8 to 128 pixels and 1 or 3 channels are supported; other shapes are refused by their size."""
    file = npz(x_train=np.zeros((10, *shape), np.uint8), y_train=np.zeros(10, int))
    assert "x".join(str(size) for size in shape) in refused(file, "BAD_IMAGE_SHAPE")


def test_splits_of_different_size() -> None:
    """All splits have one image size."""
    file = npz(x_train=numbered(5), y_train=[0] * 5, x_test=numbered(5, height=9), y_test=[0] * 5)
    assert "9x10x1" in refused(file, "MIXED_SIZES")


def test_pickled_arrays_are_refused() -> None:
    """An array of objects is refused without running what it holds."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("the pickle was run",)

    file = npz(x_train=numbered(10), y_train=np.array([Bomb()] * 10, dtype=object))
    assert "y_train" in refused(file, "BAD_DATASET")


@pytest.mark.parametrize("file", [b"", b"GIF89a", pickle.dumps([1])])
def test_not_an_archive(file: bytes) -> None:
    """Another kind of file is refused with the kinds that are read."""
    assert "npz" in refused(file, "BAD_DATASET")


def test_a_damaged_archive() -> None:
    """An archive whose content was changed on the way is refused, not half read."""
    file = bytearray(npz(x_train=numbered(50), y_train=np.zeros(50, int)))
    file[len(file) // 4] ^= 0xFF
    refused(bytes(file), "BAD_DATASET")


def test_class_folders() -> None:
    """Folders are classes in the order of their names; without split folders the splits are cut."""
    parsed = parse(zipped(folders()))
    assert list(parsed.classes) == ["ant", "cat"]
    assert {name: len(split.labels) for name, split in parsed.splits.items()} == {"train": 12, "val": 4, "test": 4}
    for split in parsed.splits.values():
        assert split.images.shape[1:] == (8, 10, 1)
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] == 1, split.labels == 1)


def test_class_folders_below_split_folders() -> None:
    """`train`, `valid` and `test` folders are splits; a class need not be in each of them."""
    members = folders("Train/", 5) | folders("valid/", 3) | {"test/cat/1.png": png(1)}
    parsed = parse(zipped(members))
    assert {name: len(split.labels) for name, split in parsed.splits.items()} == {"train": 10, "val": 6, "test": 1}
    np.testing.assert_array_equal(parsed.splits["test"].labels, [1])
    assert not any(split.cut_by_seed for split in parsed.splits.values())


@pytest.mark.parametrize("beside", [None, "__MACOSX/pets/train/cat/._000.png", "README.md"])
def test_one_folder_around_everything(beside: str | None) -> None:
    """A folder around the splits changes nothing: images under `test` never become training data.

    Neither do hidden files beside that folder, such as a Mac's.
    """
    members = folders("pets/train/", 5) | folders("pets/val/", 3) | folders("pets/test/", 2)
    inside = parse(zipped(members | ({beside: b"x"} if beside else {})))
    assert {name: len(split.labels) for name, split in inside.splits.items()} == {"train": 10, "val": 6, "test": 4}
    assert list(inside.classes) == ["ant", "cat"]


def test_one_folder_around_the_classes() -> None:
    """A folder around class folders changes nothing either."""
    assert list(parse(zipped(folders("pets/"))).classes) == ["ant", "cat"]


def test_declared_order_of_classes() -> None:
    """`classes.txt` says the order of the classes; it may name some without a picture."""
    parsed = parse(zipped(folders() | {"classes.txt": b"cat\ndog\n\n ant \n"}))
    assert list(parsed.classes) == ["cat", "dog", "ant"]
    train = parsed.splits["train"]
    np.testing.assert_array_equal(train.labels, np.where(train.images[:, 0, 0, 0] == 1, 0, 2))


def test_folders_that_are_not_declared() -> None:
    """A folder that `classes.txt` does not name is refused by its name."""
    assert "ant" in refused(zipped(folders() | {"classes.txt": b"cat\n"}), "LABELS_OUTSIDE_CLASSES")


def test_a_declaration_in_another_encoding() -> None:
    """A `classes.txt` that is no UTF-8 is refused by its name."""
    assert "classes.txt" in refused(zipped(folders() | {"classes.txt": "žába".encode("utf-16")}), "BAD_DATASET")


def test_pictures_of_mixed_sizes() -> None:
    """Pictures of two sizes are refused with one of each."""
    message = refused(zipped(folders() | {"cat/odd.png": png(1, size=(11, 9))}), "MIXED_SIZES")
    assert "cat/odd.png" in message
    assert "9x11" in message
    assert "8x10" in message


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 3), ("P", 3), ("LA", 1), ("1", 1)])
def test_colour_where_any_picture_has_it(mode: str, channels: int) -> None:
    """Pictures are gray where all of them are, and colour otherwise."""
    parsed = parse(zipped(folders() | {"cat/other.png": png(255, mode)}))
    assert parsed.splits["train"].images.shape[1:] == (8, 10, channels)


def test_what_is_no_picture() -> None:
    """A damaged picture is refused by its name; files of other kinds and hidden ones are passed over."""
    ignored = {"README.md": b"x", "__MACOSX/cat/._1.png": b"x", "cat/notes.txt": b"x"}
    assert list(parse(zipped(folders() | ignored)).classes) == ["ant", "cat"]
    assert "cat/bad.png" in refused(zipped(folders() | {"cat/bad.png": b"no picture"}), "BAD_DATASET")
    assert "cat/cut.png" in refused(zipped(folders() | {"cat/cut.png": png(1)[:50]}), "BAD_DATASET")


@pytest.mark.parametrize("content", [b"P5\n10 eight\n255\n", b"P5\n100000 100000\n255\n", png(1)[:30]])
def test_a_damaged_picture_of_any_kind(content: bytes) -> None:
    """For any fault of an image, unreadable or absurdly large, the image is named."""
    assert "cat/bad.ppm" in refused(zipped(folders() | {"cat/bad.ppm": content}), "BAD_DATASET")


def test_a_picture_of_more_than_eight_bits() -> None:
    """A picture whose values do not fit in bytes is refused by its name, not shown white."""
    Image.fromarray(np.full((8, 10), 30_000, np.uint16)).save(buffer := io.BytesIO(), "PNG")
    assert "cat/deep.png" in refused(zipped(folders() | {"cat/deep.png": buffer.getvalue()}), "BAD_DATASET")


def test_a_picture_outside_class_folders() -> None:
    """A picture at the top has no class and is refused by its name."""
    assert "'stray.png'" in refused(zipped(folders() | {"stray.png": png(1)}), "BAD_DATASET")


@pytest.mark.parametrize("members", [{}, {"cat/notes.txt": b"x"}])
def test_folders_without_pictures(members: dict[str, bytes]) -> None:
    """An archive without pictures is refused."""
    assert "no pictures" in refused(zipped(members), "EMPTY_SPLIT")
