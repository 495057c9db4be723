"""Runs on what caused an alert, over a real gateway before a real Triton."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from defuse.v1 import dataset_pb2, guard_pb2, monitor_pb2, release_pb2, run_pb2
from defuse.v1 import monitor_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.gateway_process import running_gateway
from tests.monitored import MODEL, TIMEOUT_S, batches_in, messages, monitor_stub, observation
from tests.restartable_triton import Served

BEFORE = run_pb2.RunConfig(
    model=MODEL,
    model_version=7,  # which Triton serves no more
    dataset="datasets/base",
    seed=5,
    vae={"latent_dim": 3},
    preflight={"declared_accuracy": 0.9},
)
GUARD = f"{MODEL}/guards/1"
ALERT = f"{MODEL}/alerts/20261126T144500.000000-abc123"
REGION = "runs/first/regions/r2"
# Far in the future: retention never deletes these hours.
BEGAN_S, RAISED_S = 4_000_000_000, 4_000_001_000
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), np.uint8)
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A gateway, and what it keeps its records in."""

    stub: Any
    store: ArtifactStore

    def start(self, name: str = ALERT) -> run_pb2.Run:
        return self.stub.StartAlertRun(pb.StartAlertRunRequest(name=name), timeout=TIMEOUT_S).run  # type: ignore[no-any-return]

    def refused(self, name: str = ALERT) -> Any:
        with pytest.raises(grpc.RpcError) as error:
            self.start(name)
        return error.value

    def watched(self, indices: list[int], inside: list[bool]) -> None:
        """Say what the guard says of the one batch that was reported."""
        [batch] = batches_in(self.store)
        kept = self.store.read_arrays(keys.observed_images(batch))
        seen = {"id": kept["id"], "index": np.array(indices), "inside": np.array(inside)}
        self.store.write_arrays(keys.observation_scores(batch), seen)


@pytest.fixture
def place(redis_url: str, tmp_path: Path, served: Served) -> Iterator[Place]:
    with (
        running_gateway(tmp_path, redis_url, DEFUSE_TRITON_URL=served.address) as door,
        monitor_stub(door.address) as stub,
    ):
        plant(door.store, served)
        yield Place(stub=stub, store=door.store)


def plant(store: ArtifactStore, served: Served) -> None:
    """Make what an alert leads back to: model, run with data and VAE, guard, and the alert."""
    store.write_message(keys.model(MODEL), served.model)
    store.write_message(f"{keys.releases(MODEL)}/1.pb", release_pb2.Release(model=MODEL, version=1))
    store.write_message(keys.run("runs/first"), run_pb2.Run(name="runs/first", config=BEFORE))
    for part in ("encoder", "decoder"):
        store.write_bytes(keys.vae(BEFORE, f"{part}.onnx"), part.encode())
    splits = [dataset_pb2.Split(name=name, size=3, cut_by_seed=True) for name in ("train", "val", "test")]
    # In another order than the model's.
    data = dataset_pb2.Dataset(
        name=BEFORE.dataset, image_shape=[8, 10, 3], classes=["cat", "ant", "bee"], label_count=3, splits=splits
    )
    store.write_message(keys.dataset(data.name), data)
    for number, split in enumerate(splits):
        arrays = {"x": np.full((3, 8, 10, 3), number, np.uint8), "y": np.arange(3)}
        store.write_arrays(keys.split(data.name, split.name), arrays)
    regions = [
        {"region": f"runs/first/regions/r{number}", "label": label} for number, label in ((1, "ant"), (2, "bee"))
    ]
    guard = guard_pb2.Guard(name=GUARD, run="runs/first", regions=regions, create_time={"seconds": BEGAN_S})
    store.write_message(keys.guard(GUARD), guard)
    store.write_message(
        keys.alert(ALERT),
        monitor_pb2.Alert(
            name=ALERT,
            kind=monitor_pb2.Alert.KIND_REGION_HITS,
            subject=REGION,
            create_time={"seconds": RAISED_S},
        ),
    )


def seen_at(seconds: int, row: int) -> monitor_pb2.Observation:
    fields = {"time": Timestamp(seconds=seconds), "scores": [1, 2, 3]}
    return observation(str(row), IMAGES[row], **fields)


def move_to_hour_of(place: Place, seconds: int) -> None:
    """Let what was reported now have been reported then."""
    moment = Timestamp(seconds=seconds).ToDatetime()
    [batch] = batches_in(place.store)
    hour = keys.observations(MODEL, f"{moment:%Y-%m-%d-%H}")
    for key in place.store.keys(batch):
        place.store.write_bytes(f"{hour}/one/{key.rpartition('/')[2]}", place.store.read_bytes(key))
    place.store.remove_below(batch)


def test_a_run_on_what_caused_an_alert(place: Place) -> None:
    """On images inside the region since the monitor began anew, as the region's label; the VAE is the guard's."""
    times = [BEGAN_S + 1, BEGAN_S + 2, BEGAN_S - 1, RAISED_S, RAISED_S + 1, BEGAN_S + 3]
    place.stub.Report(messages("one", [seen_at(*pair) for pair in zip(times, range(6), strict=True)]))
    move_to_hour_of(place, RAISED_S)
    place.watched([1, 0, 1, 1, 1, 1], [True, True, True, True, True, False])
    run = place.start()
    assert run.name == "runs/tiny-20261126T144500.000000-abc123"
    config = run.config
    assert (config.model_version, config.seed, config.preflight.declared_accuracy) == (1, 5, 0)
    files = [
        place.store.read_bytes(keys.file(digest)) for digest in (config.vae.encoder_digest, config.vae.decoder_digest)
    ]
    assert files == [b"encoder", b"decoder"]
    data = place.store.read_message(keys.dataset(config.dataset), dataset_pb2.Dataset)
    assert [(split.name, split.size, split.cut_by_seed) for split in data.splits] == [
        ("train", 3, True),
        ("val", 2, False),
        ("test", 3, True),
    ]
    searched = place.store.read_arrays(keys.split(config.dataset, "val"))
    np.testing.assert_array_equal(searched["x"], IMAGES[[0, 3]])
    np.testing.assert_array_equal(searched["y"], [2, 2])  # `bee`, as the data set counts
    for split in ("train", "test"):
        before, after = (place.store.read_bytes(keys.split(name, split)) for name in ("datasets/base", config.dataset))
        assert before == after
    listed = place.stub.ListAlerts(pb.ListAlertsRequest(model=MODEL), timeout=TIMEOUT_S).alerts
    assert [alert.run for alert in listed] == [run.name]
    assert place.start() == run


def test_a_run_that_was_created_and_not_noted(place: Place) -> None:
    """It is found by its id, and nothing is made twice."""
    place.stub.Report(messages("one", [seen_at(BEGAN_S + 1, 0)]))
    move_to_hour_of(place, BEGAN_S)
    place.watched([1], [True])
    run = place.start()
    alert = place.store.read_message(keys.alert(ALERT), monitor_pb2.Alert)
    alert.run = ""  # and died
    place.store.write_message(keys.alert(ALERT), alert)
    place.store.remove_below(keys.observed_hours(MODEL))
    assert place.start() == run


def test_alerts_that_start_no_run(place: Place) -> None:
    """Where no image was kept, or the alert is about no region."""
    error = place.refused()
    assert (error.code(), "no image is kept" in error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    drift = monitor_pb2.Alert(name=f"{MODEL}/alerts/b", kind=monitor_pb2.Alert.KIND_LATENT_DRIFT)
    place.store.write_message(keys.alert(drift.name), drift)
    assert "is about no region" in place.refused(drift.name).details()
    assert place.refused(f"{MODEL}/alerts/none").code() == grpc.StatusCode.NOT_FOUND
