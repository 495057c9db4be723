from collections.abc import Sequence

import numpy as np
import pytest
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import dataset_pb2, model_pb2, region_pb2, release_pb2, run_pb2

from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, label_map

MODEL = model_pb2.Model(name="models/pets", classes=["ant", "bee", "cat"])


def dataset(classes: Sequence[str] = (), label_count: int = 0) -> dataset_pb2.Dataset:
    return dataset_pb2.Dataset(name="datasets/d1", classes=classes, label_count=label_count or len(classes))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dataset(["cat", "ant", "bee"]), [2, 0, 1]),
        (dataset(["cat"]), [2]),
        (dataset(["2", "0"]), [2, 0]),
        (dataset(label_count=2), [0, 1]),
        (dataset(label_count=3), [0, 1, 2]),
    ],
)
def test_labels_become_class_ids(given: dataset_pb2.Dataset, expected: list[int]) -> None:
    """Class names decide where there are any; folders named by number and plain ids are class ids."""
    np.testing.assert_array_equal(label_map(given, MODEL), expected)


def test_names_that_are_numbers() -> None:
    """Where the model's classes are called by numbers, a folder's number is a name and no id."""
    model = model_pb2.Model(name="models/odd", classes=["1", "3", "5"])
    np.testing.assert_array_equal(label_map(dataset(["3", "5"]), model), [1, 2])


@pytest.mark.parametrize(
    ("given", "culprit"),
    [
        (dataset(["ant", "dog"]), "dog"),
        (dataset(["0", "3"]), "3"),
        (dataset(label_count=5), "3, 4"),
        (dataset(["0", "dog"]), "0, dog"),
    ],
)
def test_labels_that_the_model_does_not_have(given: dataset_pb2.Dataset, culprit: str) -> None:
    """Unknown labels are refused by name, beside the classes that there are."""
    with pytest.raises(InvalidInput, match=culprit) as caught:
        label_map(given, MODEL)
    assert caught.value.reason == "LABELS_OUTSIDE_CLASSES"
    assert "ant, bee, cat" in caught.value.message


def test_a_split_has_class_ids_of_the_model(store: ArtifactStore) -> None:
    """A split is read with its labels as the model's class ids."""
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
    store.write_message(keys.dataset("datasets/d1"), dataset(["cat", "ant"]))
    store.write_arrays(keys.split("datasets/d1", "train"), {"x": images, "y": np.array([0, 1, 0])})
    split = Catalog(store).split("datasets/d1", "train", MODEL)
    np.testing.assert_array_equal(split.labels, [2, 0, 2])
    np.testing.assert_array_equal(split.images, images)


def test_the_champion_is_folded_from_the_releases(store: ArtifactStore) -> None:
    """For any content of the record, the champion is that of the last release; partial releases do not count."""
    store.write_message(keys.model(MODEL.name), MODEL)
    for key, version in (("10", 1), ("20", 2), ("30", 1), ("25", 3)):
        store.write_message(f"{keys.releases(MODEL.name)}/{key}.pb", release_pb2.Release(version=version))
    store.write_bytes(f"{keys.releases(MODEL.name)}/40.pb.abc.partial", b"half")
    reader = Catalog(store)
    assert reader.model(MODEL.name).champion_version == 1
    assert [release.version for release in reader.releases(MODEL.name)] == [1, 2, 3, 1]


def test_a_region_is_found_by_its_name(store: ArtifactStore) -> None:
    """A region is one of its run's distillation."""
    store.write_message(keys.run("runs/a"), run_pb2.Run(name="runs/a"))
    regions = [region_pb2.Region(name=f"runs/a/regions/r{rank}", size=rank) for rank in (1, 2)]
    store.write_message(keys.distillation("runs/a"), region_pb2.Distillation(regions=regions))
    assert Catalog(store).region("runs/a/regions/r2").size == 2
    with pytest.raises(NotFound, match=r"'a' has no region 'r3'; it has: r1, r2"):
        Catalog(store).region("runs/a/regions/r3")


def test_a_part_is_found_by_its_name(store: ArtifactStore) -> None:
    """A part is one of the region that was split, a part of a part one of that part; others are named."""
    store.write_message(keys.run("runs/a-run"), run_pb2.Run(name="runs/a-run"))
    regions = "runs/a-run/regions"
    for key, names in (
        (keys.distillation("runs/a-run"), ("r1", "r2")),
        (keys.region_parts(f"{regions}/r2"), ("r2-1", "r2-2")),
        (keys.region_parts(f"{regions}/r2-1"), ("r2-1-1",)),
    ):
        found = [region_pb2.Region(name=f"{regions}/{name}", size=len(name)) for name in names]
        store.write_message(key, region_pb2.Distillation(regions=found))
    reader = Catalog(store)
    for name in ("r2", "r2-2", "r2-1-1"):
        assert reader.region(f"{regions}/{name}").size == len(name)
    assert [part.name for part in reader.parts(f"{regions}/r2")] == [f"{regions}/r2-1", f"{regions}/r2-2"]
    assert reader.parts(f"{regions}/r1") == []
    for unknown, known in (("r2-3", "r2-1, r2-2"), ("r1-1", "r1, r2"), ("r2-2-1", "r1, r2")):
        with pytest.raises(NotFound, match=f"'a-run' has no region '{unknown}'; it has: {known}"):
            reader.region(f"{regions}/{unknown}")


def test_the_failures_of_a_region(store: ArtifactStore) -> None:
    """A region's failures, held-out ones too, come with all that the search knows of them, in the search's order."""
    latent = np.arange(12, dtype=np.float32).reshape(6, 2)
    source, draw = np.array([5, 5, 2, 9, 1, 3]), np.array([1, 0, 0, 0, 0, 0])
    for shard, rows in enumerate((slice(0, 4), slice(4, 6))):
        values = {"latent": latent, "source": source, "round": 0 * draw, "draw": draw, "margin": -np.arange(6.0)}
        store.write_arrays(
            keys.shard_result("runs/a", 0, shard),
            {f"failures.{name}": array[rows] for name, array in values.items()},
        )
    for name, members, held_out in (("r1", [3, 0], [4, 1]), ("r2", [2], [])):
        arrays = {"latent": latent[members], "held_out_latent": latent[held_out].reshape(-1, 2)}
        store.write_arrays(keys.region_arrays(f"runs/a/regions/{name}"), arrays)
    first, second = Catalog(store).region_failures("runs/a", ["runs/a/regions/r1", "runs/a/regions/r2"])
    assert first["margin"].tolist() == [-4, -1, 0, -3]
    assert first["source"].tolist() == [1, 5, 5, 9]
    assert second["latent"].tolist() == [latent[2].tolist()]


def test_a_run_without_regions_yet(store: ArtifactStore) -> None:
    """Before the distillation a run has no region, which is said so."""
    store.write_message(keys.run("runs/a"), run_pb2.Run(name="runs/a"))
    with pytest.raises(NotFound, match="it has: none"):
        Catalog(store).region("runs/a/regions/r1")


def test_what_is_not_there_is_named_by_its_kind(store: ArtifactStore) -> None:
    """Model, data set and run that are not there are named as a person calls them, each with its own reason."""
    reader = Catalog(store)
    for read, name, words, reason in (
        (reader.model, "models/pets", "no model 'pets'; register it with `defuse models add`", "MODEL_NOT_FOUND"),
        (reader.dataset, "datasets/d1", "no data set 'd1'", "DATASET_NOT_FOUND"),
        (reader.run, "runs/a", "no run 'a'", "RUN_NOT_FOUND"),
        (reader.region, "runs/a/regions/r1", "no run 'a'", "RUN_NOT_FOUND"),
    ):
        with pytest.raises(NotFound, match=words) as caught:
            read(name)
        assert caught.value.reason == reason


def test_names_of_another_kind_are_refused(store: ArtifactStore) -> None:
    """A name of the wrong shape never becomes a path in the store."""
    reader = Catalog(store)
    for read in (reader.model, reader.dataset, reader.run, reader.region):
        for name in ("", "a", "models/../runs", "runs/a/b", "models/a/regions/r1"):
            with pytest.raises(InvalidInput):
                read(name)


def test_runs_share_a_vae_when_data_and_settings_are_the_same() -> None:
    """The VAE belongs to the data and its own settings, and to nothing else of a run."""
    base = run_pb2.RunConfig(dataset="datasets/d1", vae={"epochs": 3})
    same = run_pb2.RunConfig(dataset="datasets/d1", vae={"epochs": 3}, seed=7, search={"radius_sd": 1.0})
    assert keys.vae(base, "decoder.onnx") == keys.vae(same, "decoder.onnx")
    others = [
        run_pb2.RunConfig(dataset="datasets/d2", vae={"epochs": 3}),
        run_pb2.RunConfig(dataset="datasets/d1", vae={"epochs": 4}),
        run_pb2.RunConfig(dataset="datasets/d1", vae={"epochs": 3, "seed": 1}),
    ]
    assert len({keys.vae(config, "decoder.onnx") for config in [base, *others]}) == 4
