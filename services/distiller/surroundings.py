"""Reads what a run's store and classifier know of real images, in the latent space that the run searched."""

import numpy as np
from defuse.v1 import model_pb2, run_pb2, work_pb2

from services.arrays import Array
from services.distiller.evidence import Searched, Surroundings, Training
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.triton.client import Classifier

# Images that are classified at once.
_BATCH = 4_096


def read_surroundings(store: ArtifactStore, run: run_pb2.Run, classifier: Classifier, shard_count: int) -> Surroundings:
    """Read the posteriors of real images; the training images among them are classified, through Triton."""
    reference = store.read_arrays(keys.reference(run.config))
    train = Catalog(store).split(run.config.dataset, "train", classifier.model)
    return Surroundings(
        searched=_searched(store, run, classifier.model, shard_count),
        training=Training(
            latent=reference["latent"] * reference["sd_agg"],
            label=reference["label"],
            predicted=_predicted(classifier, train.images, reference["row"]),
            row=reference["row"],
        ),
        sd_agg=reference["sd_agg"],
    )


def shard_count(store: ArtifactStore, run: run_pb2.Run) -> int:
    """Return how many shards the search of a run has."""
    sources = len(store.map_arrays(keys.sources(run.name))["index"])
    return -(-sources // run.config.search.shard_size)


def read_failures(store: ArtifactStore, work: work_pb2.DistillWork) -> dict[str, Array]:
    """Return the failures of a run as arrays, in the order of their sources, rounds and draws."""
    reader = Catalog(store)
    shards = [
        reader.failures(work.run.name, round_, shard)
        for round_ in range(work.round_count)
        for shard in range(work.shard_count)
    ]
    failures = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    order = np.lexsort((failures["draw"], failures["round"], failures["source"]))
    return {name: array[order] for name, array in failures.items()}


def _searched(store: ArtifactStore, run: run_pb2.Run, model: model_pb2.Model, shard_count: int) -> Searched:
    parts = [store.read_arrays(keys.shard_sources(run.name, shard)) for shard in range(shard_count)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    index = store.read_arrays(keys.sources(run.name))["index"]
    labels = Catalog(store).split(run.config.dataset, keys.SEARCHED_SPLIT, model).labels
    return Searched(
        latent=arrays["mu"],
        label=labels[index],
        wrong_on_image=arrays["image_margin"] <= 0,
        wrong_on_reconstruction=arrays["reconstruction_margin"] <= 0,
    )


def _predicted(classifier: Classifier, images: Array, rows: Array) -> Array:
    """Return the class that each of some stored images is taken for, (r,)."""
    parts = [
        classifier.classify_stored(images[rows[begin : begin + _BATCH]]).argmax(axis=1)
        for begin in range(0, len(rows), _BATCH)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])
