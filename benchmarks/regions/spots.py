"""A classifier with planted blind spots, an oracle without, and the data that a run of it gets."""

from dataclasses import dataclass, replace

from defuse.v1 import model_pb2

from benchmarks.identify import planted
from benchmarks.stand import Data, Stand


@dataclass(frozen=True, kw_only=True)
class Planted:
    """The spots, the classifier that was trained with them in its labels, and one that knows the truth."""

    spots: planted.Spots
    model: model_pb2.Model
    oracle: model_pb2.Model


def independent(stand: Stand, data: Data, *, epochs: int) -> model_pb2.Model:
    """Train a classifier on the right labels, or take it from the cache, and serve it."""
    return stand.register("independent", data, data.labels["train"], seed=7, epochs=epochs)


def served(stand: Stand, data: Data, *, oracle: model_pb2.Model, epochs: int, seed: int = 3) -> Planted:
    """Train a classifier with the spots in its labels, or take it from the cache, and serve it."""
    spots = planted.plant(data)
    wrong = spots.labels(data.images["train"], data.labels["train"])
    model = stand.register(f"planted{seed}", data, wrong, seed=seed, epochs=epochs)
    return Planted(spots=spots, model=model, oracle=oracle)


def handed_over(data: Data, spots: planted.Spots, *, absent: bool) -> Data:
    """Return the data, without the images of the spots where they are to be absent."""
    if not absent:
        return data
    kept = {split: ~spots.contain(data.images[split], data.labels[split]) for split in data.images}
    return replace(
        data,
        images={split: images[kept[split]] for split, images in data.images.items()},
        labels={split: labels[kept[split]] for split, labels in data.labels.items()},
    )
