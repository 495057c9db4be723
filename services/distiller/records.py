"""A finding as it is stored and sent: the record of a region, and its arrays with the pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from defuse.v1 import region_pb2, run_pb2

from services.arrays import Array
from services.distiller.evidence import Near
from services.distiller.findings import Finding
from services.latent_space.autoencoder import read_decoder
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import estimate
from services.triton.preprocessing import as_stored

# Bytes of all pictures of a region, at most.
_PICTURES_BYTES = 4 << 20


def region(
    name: str, finding: Finding, total: int, failures: dict[str, Array], classes: Sequence[str]
) -> region_pb2.Region:
    """Return the record of a region, one of a run with so many failures in total."""
    group, trial = finding.group, finding.trial
    record = region_pb2.Region(
        name=name,
        weight=len(group.members) / total,
        size=len(group.members),
        held_out_size=len(group.held_out_members),
        true_label=classes[group.true_label],
        predicted_label=classes[group.predicted_label],
        profile=[
            region_pb2.Confusion(true_label=classes[true], predicted_label=classes[predicted], count=count)
            for (true, predicted), count in group.profile
        ],
        error_rate=estimate(trial.errors, trial.decodes),
        suggested_label=finding.suggested_label,
        suggestion_reason=finding.suggestion_reason,
        score=finding.score,
        typicality=finding.real.typicality,
        control_error_rate=estimate(trial.control_errors, trial.controls),
        p_value=trial.p_value,
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


def _real_images(near: Near, classes: Sequence[str]) -> list[region_pb2.RealImage]:
    return [
        region_pb2.RealImage(index=row, label=classes[label], predicted_label=classes[predicted], distance_sd=distance)
        for row, label, predicted, distance in zip(
            near.row.tolist(), near.label.tolist(), near.predicted.tolist(), near.distance_sd.tolist(), strict=True
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Where a run's pictures come from."""

    decode: Callable[[Array], Array]
    # Stored images (n, h, w, c) of the splits, on disk until they are used.
    searched: Array
    train: Array

    @classmethod
    def read(cls, store: ArtifactStore, run: run_pb2.Run) -> Self:
        searched, train = (
            store.map_arrays(keys.split(run.config.dataset, split))["x"] for split in (keys.SEARCHED_SPLIT, "train")
        )
        return cls(decode=read_decoder(store, run.config), searched=searched, train=train)

    def arrays(self, finding: Finding, failures: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays of a region, as they are stored."""
        group, few = finding.group, self._few()
        shown, near, known = finding.exemplars[:few], finding.nearest, finding.nearest_misclassified
        return {
            "mean": group.gaussian.mean,
            "covariance": group.gaussian.covariance,
            "latent": failures["latent"][group.members],
            "source": failures["source"][group.members],
            "held_out_latent": failures["latent"][group.held_out_members],
            "held_out_source": failures["source"][group.held_out_members],
            "exemplars": as_stored(self.decode(failures["latent"][shown])),
            "exemplar_sources": self.searched[failures["source"][shown]],
            "nearest": self.train[near.row[:few]],
            "nearest_misclassified": self.train[known.row[:few]],
        }

    def _few(self) -> int:
        """Return of how many of a kind there are pictures: all four kinds are sent in one message."""
        return max(1, _PICTURES_BYTES // (4 * int(np.prod(self.train.shape[1:]))))
