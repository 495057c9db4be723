"""The arrays of a run that the distiller reads and writes.

It reads failures and the images around them, and writes regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from defuse.v1 import model_pb2, region_pb2, run_pb2, work_pb2

from services.arrays import Array, as_stored
from services.distiller.findings import Finding, NearestImages, SearchedImages, Surroundings, TrainingImages
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, estimate
from services.triton.client import Classifier

# Images of one classification call.
_BATCH = 4_096


def read_surroundings(store: ArtifactStore, run: run_pb2.Run, classifier: Classifier, shard_count: int) -> Surroundings:
    """Return the real images around a run's failures, with their latents.

    The training images among them are classified through Triton.
    """
    reference = store.read_arrays(keys.reference(run.config))
    train = Catalog(store).split(run.config.dataset, "train", classifier.model)
    return Surroundings(
        searched=_searched(store, run, classifier.model, shard_count),
        training=TrainingImages(
            latent=reference["latent"] * reference["sd_agg"],
            label=reference["label"],
            predicted=_predicted(classifier, train.images, reference["row"]),
            row=reference["row"],
        ),
        sd_agg=reference["sd_agg"],
    )


def shard_count(store: ArtifactStore, run: run_pb2.Run) -> int:
    """Return the number of shards of a run's search."""
    sources = len(store.map_arrays(keys.sources(run.name))["index"])
    return -(-sources // run.config.search.shard_size)


def read_failures(store: ArtifactStore, work: work_pb2.DistillWork) -> dict[str, Array]:
    """Return the failures of a run, sorted by source, round and draw."""
    reader = Catalog(store)
    shards = [
        reader.failures(work.run.name, round_, shard)
        for round_ in range(work.round_count)
        for shard in range(work.shard_count)
    ]
    failures = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    order = np.lexsort((failures["draw"], failures["round"], failures["source"]))
    return {name: array[order] for name, array in failures.items()}


def _searched(store: ArtifactStore, run: run_pb2.Run, model: model_pb2.Model, shard_count: int) -> SearchedImages:
    parts = [store.read_arrays(keys.shard_sources(run.name, shard)) for shard in range(shard_count)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    index = store.read_arrays(keys.sources(run.name))["index"]
    labels = Catalog(store).split(run.config.dataset, keys.SEARCHED_SPLIT, model).labels
    return SearchedImages(
        row=index,
        latent=arrays["mu"],
        label=labels[index],
        wrong_on_image=arrays["image_margin"] <= 0,
        wrong_on_reconstruction=arrays["reconstruction_margin"] <= 0,
    )


def _predicted(classifier: Classifier, images: Array, rows: Array) -> Array:
    """Return the predicted class (r,) of some stored images."""
    parts = [
        classifier.classify_stored(images[rows[begin : begin + _BATCH]]).argmax(axis=1)
        for begin in range(0, len(rows), _BATCH)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


# Largest size of a region's images in bytes.
_PICTURES_BYTES = 4 << 20


def region_record(
    name: str, finding: Finding, total: int, failures: dict[str, Array], classes: Sequence[str]
) -> region_pb2.Region:
    """Return the record of a region, in a run with `total` failures."""
    group, test = finding.group, finding.test
    record = region_pb2.Region(
        name=name,
        weight=len(group.members) / total,
        size=len(group.members),
        source_count=group.source_count,
        held_out_size=len(group.held_out_members),
        true_label=classes[group.true_label],
        predicted_label=classes[group.predicted_label],
        profile=[
            region_pb2.Confusion(true_label=classes[true], predicted_label=classes[predicted], count=count)
            for (true, predicted), count in group.profile
        ],
        error_rate=estimate(test.errors, test.decodes),
        suggested_label=finding.suggested_label,
        suggestion_reason=finding.suggestion_reason,
        score=finding.score,
        typicality=finding.real.typicality,
        control_error_rate=estimate(test.control_errors, test.controls),
        p_value=test.p_value,
        q_value=finding.q_value,
        real_error_rate=estimate(finding.real.wrong, finding.real.images),
        stability=finding.stability,
        radius_sd=float(np.median(failures["radius_sd"][group.members])),
        nearest=_real_images(finding.nearest, classes),
        nearest_misclassified=_real_images(finding.nearest_misclassified, classes),
    )
    if finding.novelty_sd is not None:
        record.novelty_sd = finding.novelty_sd
    return record


def _real_images(near: NearestImages, classes: Sequence[str]) -> list[region_pb2.RealImage]:
    return [
        region_pb2.RealImage(index=row, label=classes[label], predicted_label=classes[predicted], distance_sd=distance)
        for row, label, predicted, distance in zip(
            near.row.tolist(), near.label.tolist(), near.predicted.tolist(), near.distance_sd.tolist(), strict=True
        )
    ]


@dataclass(frozen=True, kw_only=True)
class PictureRenderer:
    """Renders the images that a region shows."""

    images: RunImages
    # Stored images (n, h, w, c) of the splits, mapped from disk.
    searched: Array
    train: Array

    @classmethod
    def read(cls, store: ArtifactStore, run: run_pb2.Run, images: RunImages) -> Self:
        searched, train = (
            store.map_arrays(keys.split(run.config.dataset, split))["x"] for split in (keys.SEARCHED_SPLIT, "train")
        )
        return cls(images=images, searched=searched, train=train)

    def arrays(self, finding: Finding, failures: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays of a region, as they are stored."""
        group, few = finding.group, self._few()
        shown, near, known = finding.exemplars[:few], finding.nearest, finding.nearest_misclassified
        exemplars = Perturbations(latent=failures["latent"][shown], source=failures["source"][shown])
        return {
            "mean": group.gaussian.mean,
            "covariance": group.gaussian.covariance,
            "latent": failures["latent"][group.members],
            "source": failures["source"][group.members],
            "held_out_latent": failures["latent"][group.held_out_members],
            "held_out_source": failures["source"][group.held_out_members],
            "exemplars": as_stored(self.images.render(exemplars)),
            "exemplar_sources": self.searched[failures["source"][shown]],
            "nearest": self.train[near.row[:few]],
            "nearest_misclassified": self.train[known.row[:few]],
        }

    def _few(self) -> int:
        """Return the number of images of each kind that a region has.

        There are four kinds, which are sent in one message.
        """
        return max(1, _PICTURES_BYTES // (4 * int(np.prod(self.train.shape[1:]))))
