"""Captured images that a guard found inside a region."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from defuse import names
from defuse.errors import NotFound
from defuse.v1 import monitor_pb2

from services.arrays import Array
from services.gateway.monitoring.reports import HOUR
from services.storage import keys
from services.storage.artifacts import ArtifactStore


@dataclass(frozen=True, kw_only=True)
class Period:
    """From a moment, itself not included, until another."""

    since: datetime
    until: datetime

    def __contains__(self, moment: datetime) -> bool:
        return self.since < moment <= self.until

    def may_hold(self, hour: str) -> bool:
        """Say whether what was reported within an hour can have been answered, and looked at, in this period."""
        return self.since.strftime(HOUR) <= names.last(hour) <= self.until.strftime(HOUR)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Images of one batch, which stay as they are whatever is deleted meanwhile."""

    # Names of the observations, (n, 16) uint8.
    ids: Array
    # All images of the batch (m, h, w, c) uint8, on disk until they are used, and which of them they are (n,).
    images: Array
    rows: Array

    def read(self) -> Array:
        """Return the images (n, h, w, c)."""
        return np.asarray(self.images[self.rows])


def captured(store: ArtifactStore, model_name: str, region: int, period: Period) -> Sequence[Captured]:
    """Return the images that were answered in a period and fall in the region of this index, batch by batch."""
    return [
        found
        for hour in store.keys(keys.observed_hours(model_name))
        if period.may_hold(hour)
        for batch in store.keys(hour)
        for found in _of_batch(store, batch, region, period)
    ]


def _of_batch(store: ArtifactStore, batch: str, region: int, period: Period) -> Iterator[Captured]:
    try:
        record = store.read_message(keys.reported(batch), monitor_pb2.ObservationBatch)
        seen = store.map_arrays(keys.watched(batch))
        kept = store.map_arrays(keys.observed_images(batch))
    except NotFound:
        return  # not looked at yet, not kept, or deleted
    within = {keys.observation_digest(one.id) for one in record.observations if one.time.ToDatetime(UTC) in period}
    inside = np.array(seen["id"])[(np.array(seen["index"]) == region) & np.array(seen["inside"], bool)]
    wanted = within & {name.tobytes() for name in inside}
    shown = np.array(kept["id"])[np.array(kept["has_image"], bool)]
    rows = np.array([row for row, name in enumerate(shown) if name.tobytes() in wanted], np.int64)
    if len(rows):
        yield Captured(ids=shown[rows], images=kept["image"], rows=rows)
