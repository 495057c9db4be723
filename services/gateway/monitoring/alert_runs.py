"""Alert runs: searches around the captured images of an alert's region."""

import asyncio
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from defuse import names
from defuse.errors import InvalidInput, NotFound, NotReady
from defuse.v1 import dataset_pb2, guard_pb2, model_pb2, monitor_pb2, run_pb2

from services.arrays import Array
from services.gateway.monitoring.alerts import Alerts
from services.gateway.monitoring.batches import HOUR
from services.gateway.runs.runs import Runs
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, label_map
from services.storage.keys import SEARCHED_SPLIT
from services.storage.safetensors import StreamedArray


@dataclass(frozen=True, kw_only=True)
class Period:
    """A time period, which excludes its begin and includes its end."""

    since: datetime
    until: datetime

    def __contains__(self, moment: datetime) -> bool:
        return self.since < moment <= self.until

    def may_hold(self, hour: str) -> bool:
        """Return whether observations of an hour may belong to this period.

        Observations are stored by the hour in which they were reported.
        """
        return self.since.strftime(HOUR) <= names.last(hour) <= self.until.strftime(HOUR)


@dataclass(frozen=True, kw_only=True)
class CapturedImages:
    """Captured images of one batch, which a later deletion does not change."""

    # Ids of the observations, (n, 16) uint8.
    ids: Array
    # All images of the batch, (m, h, w, c) uint8 and mapped from disk, and the selected rows (n,).
    images: Array
    rows: Array

    def read(self) -> Array:
        """Return the selected images (n, h, w, c) uint8."""
        return np.asarray(self.images[self.rows])


def captured_images(store: ArtifactStore, model_name: str, region: int, period: Period) -> Sequence[CapturedImages]:
    """Return the images of a period in one region, by batch.

    `region` is the index of the region in its guard.
    """
    return [
        found
        for hour in store.keys(keys.observed_hours(model_name))
        if period.may_hold(hour)
        for batch in store.keys(hour)
        for found in _of_batch(store, batch, region, period)
    ]


def _of_batch(store: ArtifactStore, batch: str, region: int, period: Period) -> Iterator[CapturedImages]:
    try:
        record = store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
        seen = store.map_arrays(keys.observation_scores(batch))
        kept = store.map_arrays(keys.observed_images(batch))
    except NotFound:
        return  # not scored yet, not kept, or deleted
    within = {keys.observation_digest(one.id) for one in record.observations if one.time.ToDatetime(UTC) in period}
    inside = np.array(seen["id"])[(np.array(seen["index"]) == region) & np.array(seen["inside"], bool)]
    wanted = within & {name.tobytes() for name in inside}
    shown = np.array(kept["id"])[np.array(kept["has_image"], bool)]
    rows = np.array([row for row, name in enumerate(shown) if name.tobytes() in wanted], np.int64)
    if len(rows):
        yield CapturedImages(ids=shown[rows], images=kept["image"], rows=rows)


_LONGEST_ID = 63
_VAE_PARTS = {"encoder_digest": "encoder.onnx", "decoder_digest": "decoder.onnx"}


@dataclass(frozen=True, kw_only=True)
class _Cause:
    """The model, guard and region that an alert is about."""

    model: model_pb2.Model
    guard: guard_pb2.Guard
    # Index of the region among the guard's.
    region: int

    @property
    def label(self) -> str:
        return self.guard.regions[self.region].label


class AlertRuns:
    """Starts runs on the images that caused alerts."""

    def __init__(self, store: ArtifactStore, alerts: Alerts, runs: Runs) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._alerts = alerts
        self._runs = runs

    async def start(self, alert_name: str) -> run_pb2.Run:
        """Return the run of an alert, which the first call starts.

        Raises InvalidInput for an alert that is not about a region, and NotReady when no images of it were kept.
        """
        alert = await self._alerts.get(alert_name)
        run_id = run_id_of(alert)
        if alert.run:
            return await self._runs.get(alert.run)
        # A run that was created before this gateway was killed is found by its id.
        with suppress(NotFound):
            return await self._noted(alert, await self._runs.get(names.run(run_id)))
        config = await asyncio.to_thread(self._config, alert)
        return await self._noted(alert, await self._runs.create(run_id, config))

    async def _noted(self, alert: monitor_pb2.Alert, run: run_pb2.Run) -> run_pb2.Run:
        alert.run = run.name
        await self._alerts.keep(alert)
        return run

    def _config(self, alert: monitor_pb2.Alert) -> run_pb2.RunConfig:
        """Return the guard's run configuration with the alert's images.

        The run searches the present champion.
        """
        cause = self._cause(alert)
        images = captured_images(self._store, cause.model.name, cause.region, self._period(alert, cause.guard))
        if not images:
            raise NotReady(
                f"no image is kept of those that caused {names.last(alert.name)!r}; a run needs KEEP_IMAGES, and "
                "images that are neither deleted nor past their retention",
                reason="NO_IMAGES_KEPT",
            )
        before = self._catalog.run(cause.guard.run).config
        config = run_pb2.RunConfig()
        config.CopyFrom(before)
        config.dataset = self._dataset(before.dataset, cause, images)
        # Triton may have unloaded versions of the guard's run.
        config.model_version = config.validity.oracle_version = 0
        config.validity_from = ""  # its advice is already part of the configuration
        config.preflight.declared_accuracy = 0  # most of these images are expected to be misclassified
        self._give_vae(before, config.vae)
        return config

    def _cause(self, alert: monitor_pb2.Alert) -> _Cause:
        if alert.kind != monitor_pb2.Alert.KIND_REGION_HITS:
            raise InvalidInput(
                f"{names.last(alert.name)!r} is about no region; runs are started by alerts about regions",
                reason="NO_REGION_ALERT",
                field="name",
            )
        model = self._catalog.model(names.parent(alert.name))
        for guard in reversed(self._catalog.guards(model.name)):
            regions = [region.region for region in guard.regions]
            if alert.subject in regions and guard.create_time.ToNanoseconds() <= alert.create_time.ToNanoseconds():
                return _Cause(model=model, guard=guard, region=regions.index(alert.subject))
        raise NotReady(
            f"no guard of {names.last(model.name)!r} knows region {alert.subject!r} any more", reason="GUARD_NOT_FOUND"
        )

    def _period(self, alert: monitor_pb2.Alert, guard: guard_pb2.Guard) -> Period:
        """Return the period of an alert's images.

        It begins when the guard was created, or at the previous alert if that is later.
        """
        earlier = [name for name in self._store.keys(keys.alerts(names.parent(alert.name))) if name < alert.name]
        begins = [guard.create_time.ToDatetime(UTC)]
        if earlier:
            last = self._store.read_message(keys.alert(earlier[-1]), monitor_pb2.Alert)
            begins.append(last.create_time.ToDatetime(UTC))
        return Period(since=max(begins), until=alert.create_time.ToDatetime(UTC))

    def _dataset(self, base_name: str, cause: _Cause, images: Sequence[CapturedImages]) -> str:
        """Return the name of a data set that searches these images.

        The first call creates the data set.
        """
        base = self._catalog.dataset(base_name)
        name = names.dataset(_digest(base_name, cause, images))
        if self._store.exists(keys.dataset(name)):
            return name
        made, label = _describe_like(base, cause.model, cause.label)
        count = sum(len(part.rows) for part in images)
        made.name, made.display_name = name, f"captured in {cause.guard.regions[cause.region].region}"
        for split in made.splits:
            if split.name != SEARCHED_SPLIT:
                self._copy(keys.split(base_name, split.name), keys.split(name, split.name))
                continue
            split.size, split.cut_by_seed = count, False
            shape = (count, *base.image_shape)
            arrays = {
                "x": StreamedArray(shape=shape, dtype=np.uint8, parts=(part.read() for part in images)),
                "y": StreamedArray.whole(np.full(count, label, np.int64)),
            }
            self._store.write_streamed(keys.split(name, SEARCHED_SPLIT), arrays)
        # Written last: a data set with a record is complete.
        self._store.write_message(keys.dataset(name), made)
        return name

    def _give_vae(self, before: run_pb2.RunConfig, vae: run_pb2.VaeConfig) -> None:
        """Set another run's VAE in a configuration, as uploaded files."""
        if vae.encoder_digest:
            return
        for field, part in _VAE_PARTS.items():
            content = self._store.read_bytes(keys.vae(before, part))
            digest = hashlib.sha256(content).hexdigest()
            if not self._store.exists(keys.file(digest)):
                self._store.write_bytes(keys.file(digest), content)
            setattr(vae, field, digest)

    def _copy(self, source: str, target: str) -> None:
        with self._store.open(source) as read, self._store.writing(target) as written:
            shutil.copyfileobj(read, written)


def run_id_of(alert: monitor_pb2.Alert) -> str:
    """Return the id of an alert's run, made of model and alert.

    The model's id is shortened when both together are too long.
    """
    alert_id = names.last(alert.name)
    model_id = names.last(names.parent(alert.name))
    return f"{model_id[: _LONGEST_ID - len(alert_id) - 1]}-{alert_id}"


def _digest(base_name: str, cause: _Cause, images: Sequence[CapturedImages]) -> str:
    """Return a digest of the content of an alert's data set.

    Ids identify the images, since a stored observation never changes.
    """
    content = hashlib.sha256(f"{base_name}:{cause.model.name}:{cause.label}".encode())
    for part in images:
        content.update(part.ids.tobytes())
    return content.hexdigest()[:16]


def _describe_like(base: dataset_pb2.Dataset, model: model_pb2.Model, label: str) -> tuple[dataset_pb2.Dataset, int]:
    """Return a data set's description, and a label's stored value.

    The description is a copy of another data set's. The label is added to its classes when it has no stored value.
    """
    made = dataset_pb2.Dataset()
    made.CopyFrom(base)
    made.create_time.GetCurrentTime()
    class_id = list(model.classes).index(label)
    stored = np.flatnonzero(label_map(base, model) == class_id)
    if len(stored):
        return made, int(stored[0])
    if not base.classes:  # plain class ids
        value = class_id
    else:
        value = len(base.classes)
        made.classes.append(label if set(base.classes) <= set(model.classes) else str(class_id))
    made.label_count = max(made.label_count, value + 1)
    return made, value
