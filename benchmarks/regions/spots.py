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


def served(stand: Stand, data: Data, *, epochs: int) -> Planted:
    """Train both classifiers, or take them from the cache, and serve them."""
    spots = planted.plant(data)
    images, labels = data.images["train"], data.labels["train"]
    wrong = spots.labels(images, labels)
    return Planted(
        spots=spots,
        model=stand.register("planted", data, wrong, seed=3, epochs=epochs),
        oracle=stand.register("independent", data, labels, seed=7, epochs=epochs),
    )


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
