"""Observations that are reported to a real gateway, with a real Redis and a real store, and what becomes of them."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from defuse.v1 import guard_pb2, monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

from services.arrays import as_floats
from services.gateway.monitoring import batches
from services.gateway.monitoring.batches import HOUR
from services.localstack.child_process import free_port
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.triton.preprocessing import preprocess
from tests.conftest import eventually
from tests.gateway_process import Door, running_gateway
from tests.monitored import (
    MODEL,
    TIMEOUT_S,
    batches_in,
    messages,
    monitor_stub,
    observation,
    pictures,
    plant_model,
    report,
    stored_ids,
    works,
)


@pytest.fixture
def door(redis_url: str, tmp_path: Path) -> Iterator[Door]:
    with running_gateway(tmp_path, redis_url) as found:
        plant_model(found.store)
        yield found


@pytest.fixture
def stub(door: Door) -> Iterator[Any]:
    with monitor_stub(door.address) as found:
        yield found


def refused(call: Any, *arguments: Any) -> Any:
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, timeout=TIMEOUT_S)
    return error.value


def test_a_batch_is_stored_and_handed_on(door: Door, stub: Any) -> None:
    """Inputs and pictures become images again, scores and the rest are kept; the stage is told of the newest guard."""
    for number in (1, 2, 10):
        name = f"{MODEL}/guards/{number}"
        door.store.write_message(keys.guard(name), guard_pb2.Guard(name=name))
    images = pictures(2)
    model = plant_model(door.store)
    sent = preprocess(as_floats(images), model)[0].tobytes()
    observations = [
        monitor_pb2.Observation(id="a", input=sent, scores=[1, 2, 3], version="4", truth="bee"),
        monitor_pb2.Observation(id="b", picture=images[1].tobytes()),
        monitor_pb2.Observation(id="c", scores=[0.5, 0, 0]),
    ]
    observations[0].time.FromSeconds(1_700_000_000)
    assert stub.Report(messages("one", observations), timeout=TIMEOUT_S).stored == 3
    [batch] = batches_in(door.store)
    assert batch.endswith("/one")
    arrays = door.store.read_arrays(keys.observed_images(batch))
    np.testing.assert_array_equal(arrays["image"], images)
    np.testing.assert_array_equal(arrays["has_image"], [True, True, False])
    np.testing.assert_array_equal(arrays["scores"], np.array([[1, 2, 3], [0, 0, 0], [0.5, 0, 0]], np.float32))
    np.testing.assert_array_equal(arrays["has_scores"], [True, False, True])
    record = door.store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
    kept = monitor_pb2.Observation(id="a", time=observations[0].time, version="4", truth="bee")
    assert record.observations[0] == kept
    assert [one.id for one in record.observations] == ["a", "b", "c"]
    [work] = works(door.redis_url)
    assert (work.model, work.batch, work.guard, work.latents_alone) == (MODEL, batch, f"{MODEL}/guards/10", False)


def test_the_same_batch_again(door: Door, stub: Any) -> None:
    """It answers the same, is stored once and handed on once."""
    assert [report(stub, "one", ["a", "b", "c"]) for _ in range(3)] == [3, 3, 3]
    assert stored_ids(door.store) == ["a", "b", "c"]
    assert len(works(door.redis_url)) == 1


def test_another_batch_under_the_same_id(stub: Any) -> None:
    """It is refused: to answer what the first was answered would lose it."""
    assert report(stub, "one", ["a", "b"]) == 2
    error = refused(stub.Report, messages("one", [observation("c")]))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "batch 'one' is stored with other observations" in error.details()


def test_the_same_batch_in_another_hour(door: Door, stub: Any) -> None:
    """Also where Redis has lost what it knew."""
    hour = (datetime.now(UTC) - timedelta(hours=1)).strftime(HOUR)
    batch = f"{keys.observations(MODEL, hour)}/one"
    earlier = monitor_pb2.ObservationBatch(observations=[monitor_pb2.Observation(id="a")])
    door.store.write_message(keys.batch_record(batch), earlier)
    assert report(stub, "one", ["a", "b"]) == 1
    assert batches_in(door.store) == [batch]


def test_the_same_observation_in_another_batch(door: Door, stub: Any) -> None:
    """It counts once, where it came first; a batch of nothing new is none."""
    assert report(stub, "one", ["a", "b"]) == 2
    assert report(stub, "two", ["b", "c"]) == 1
    assert report(stub, "three", ["a", "c"]) == 0
    assert sorted(stored_ids(door.store)) == ["a", "b", "c"]
    assert len(works(door.redis_url)) == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"picture": b"12"}, "has an image of 2 bytes; pictures of 4x5x3 for 'tiny' have 60"),
    ({"input": bytes(60)}, r"has an image of 60 bytes; inputs \(FP32\) of 4x5x3 for 'tiny' have 240"),
    ({"scores": []}, "has neither an image nor scores"),
    ({"input": np.full(60, np.nan, np.float32).tobytes()}, "has an input that is no finite number"),
    ({"scores": [1, 2]}, "has 2 scores; 'tiny' answers 3"),
    ({"scores": [1, 2, float("inf")]}, "has scores that are no finite numbers"),
    ({"truth": "dog"}, "shows 'dog', which is not a class of 'tiny'"),
    ({"version": "v" * 65}, "has a version of 65 characters"),
    ({"time": {"seconds": -1}}, "has a time of -1 s"),
    ({"id": "good", "picture": bytes(60)}, "is there twice in the batch"),
    ({"id": ""}, "has an id that is refused"),
    ({"id": "x\n"}, "has an id that is refused"),
    ({"id": "x" * 129}, "has an id that is refused"),
]


def test_what_is_refused(door: Door, stub: Any) -> None:
    """By the id of the first that is wrong; of its batch nothing is stored."""
    for fields, words in REFUSED:
        wrong = monitor_pb2.Observation(**{"id": "bad", "scores": [1, 2, 3], **fields})
        error = refused(stub.Report, messages("one", [observation("good"), wrong]))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("observation '")
        assert re.search(words, error.details()), error.details()
    assert batches_in(door.store) == []
    assert works(door.redis_url) == []


def test_batches_that_are_refused(stub: Any) -> None:
    """Of no model, without messages, too large."""
    assert refused(stub.Report, messages("one", [], model="models/none")).code() == grpc.StatusCode.NOT_FOUND
    assert "the report has no messages" in refused(stub.Report, iter([])).details()
    assert "batch id 'a b' is refused" in refused(stub.Report, messages("a b", [])).details()
    many = [monitor_pb2.Observation(id=str(number), scores=[1, 2, 3]) for number in range(10_001)]
    assert "more than 10000 observations" in refused(stub.Report, messages("one", many, at_once=1000)).details()
    assert report(stub, "one", []) == 0


class Reporters:
    """Threads that report batch after batch, each until it is stored, whatever happens to the gateway."""

    THREADS, ROWS = 4, 5

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = threading.Event()
        # Ids that were said to be stored, and codes of what was refused.
        self.acknowledged: list[str] = []
        self.codes: set[grpc.StatusCode] = set()
        self._pool = ThreadPoolExecutor(self.THREADS)
        self._threads = [self._pool.submit(self._report, thread) for thread in range(self.THREADS)]

    def wait_for_more(self) -> None:
        before = len(self.acknowledged)
        eventually(lambda: len(self.acknowledged) >= before + 100)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.result()
        self._pool.shutdown()

    def _report(self, number: int) -> None:
        with monitor_stub(self._address) as stub:
            while not self._over.is_set():
                ids = [f"{number}-{row}" for row in range(self.ROWS)]
                while self._is_refused(stub, number, ids):
                    pass
                self.acknowledged.extend(ids)
                number += self.THREADS

    def _is_refused(self, stub: Any, number: int, ids: list[str]) -> bool:
        try:
            return report(stub, f"batch-{number}", ids) != self.ROWS
        except grpc.RpcError as error:
            self.codes.add(error.code())
            return True


def test_killed_in_the_middle(redis_url: str, tmp_path: Path) -> None:
    """A confirmed report is stored once and handed on once, however often the gateway dies meanwhile."""
    address = f"127.0.0.1:{free_port()}"
    plant_model(ArtifactStore(f"file://{tmp_path}/store"))
    reporters = Reporters(address)
    for _ in range(3):
        with running_gateway(tmp_path, redis_url, address=address) as door:
            reporters.wait_for_more()
            os.kill(door.pid, signal.SIGKILL)
    with running_gateway(tmp_path, redis_url, address=address) as door:
        reporters.wait_for_more()
        reporters.end()
    assert reporters.codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED}
    assert sorted(stored_ids(door.store)) == sorted(reporters.acknowledged)
    found = batches_in(door.store)
    assert sorted(work.batch for work in works(redis_url)) == sorted(found)
    for batch in found:
        assert len(door.store.read_arrays(keys.observed_images(batch))["image"]) == Reporters.ROWS


def watch(door: Door, batch: str) -> None:
    """Look at a batch, as the stage does."""
    kept = door.store.read_arrays(keys.observed_images(batch))
    rows = np.arange(len(kept["id"]))
    seen = {"id": kept["id"], "latent": rows.astype(np.float32)[:, None], "predicted": rows % 3}
    door.store.write_arrays(keys.observation_scores(batch), seen)


def test_truth(door: Door, stub: Any) -> None:
    """It lies beside the batch it is about, the last word last; said twice it is there once."""
    report(stub, "one", ["a", "b"])
    report(stub, "two", ["c"])
    request = pb.AttachTruthRequest(model=MODEL, truths={"a": "bee", "c": "cat", "never": "ant"})
    assert [stub.AttachTruth(request, timeout=TIMEOUT_S).attached for _ in range(2)] == [2, 2]
    stub.AttachTruth(pb.AttachTruthRequest(model=MODEL, truths={"a": "ant"}), timeout=TIMEOUT_S)
    said = {
        batch.rpartition("/")[2]: [
            [(one.id, one.truth) for one in door.store.read_message(key, monitor_pb2.ObservationBatch).observations]
            for key in door.store.keys(keys.truths(batch))
        ]
        for batch in batches_in(door.store)
    }
    assert said == {"one": [[("a", "bee")], [("a", "ant")]], "two": [[("c", "cat")]]}
    error = refused(stub.AttachTruth, pb.AttachTruthRequest(model=MODEL, truths={"a": "dog"}))
    assert (error.code(), "'dog', which is not a class" in error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_deletion(door: Door, stub: Any) -> None:
    """Nothing is left of a deleted observation, and a late report does not bring it back; the others stay."""
    report(stub, "one", ["a", "b", "c"])
    report(stub, "two", ["d"])
    stub.AttachTruth(pb.AttachTruthRequest(model=MODEL, truths={"b": "bee", "c": "cat"}), timeout=TIMEOUT_S)
    one, two = batches_in(door.store)
    before = door.store.read_arrays(keys.observed_images(one))
    for batch in (one, two):
        watch(door, batch)
    request = pb.DeleteObservationsRequest(model=MODEL, ids=["b", "d", "never", "b"])
    assert stub.DeleteObservations(request, timeout=TIMEOUT_S).deleted == 2
    assert batches_in(door.store) == [one]
    assert door.store.keys(two) == []
    assert stored_ids(door.store) == ["a", "c"]
    after = door.store.read_arrays(keys.observed_images(one))
    np.testing.assert_array_equal(after["image"], before["image"][[0, 2]])
    np.testing.assert_array_equal(after["id"], batches.digests(["a", "c"]))
    np.testing.assert_array_equal(door.store.read_arrays(keys.observation_scores(one))["latent"], [[0], [2]])
    [truth] = door.store.keys(keys.truths(one))
    said = door.store.read_message(truth, monitor_pb2.ObservationBatch).observations
    assert [(observed.id, observed.truth) for observed in said] == [("c", "cat")]
    assert stub.DeleteObservations(request, timeout=TIMEOUT_S).deleted == 2  # the answer of the first
    late = {batch: report(stub, batch, ids) for batch, ids in {"one": "abc", "two": "d", "three": "be"}.items()}
    assert late == {"one": 2, "two": 0, "three": 1}
    assert sorted(stored_ids(door.store)) == ["a", "c", "e"]
    truth_of_deleted = pb.AttachTruthRequest(model=MODEL, truths={"b": "bee"})
    assert stub.AttachTruth(truth_of_deleted, timeout=TIMEOUT_S).attached == 0


def test_a_deletion_that_was_cut_short(door: Door, stub: Any) -> None:
    """A repeated request deletes the rest, in any file."""
    report(stub, "one", ["a", "b"])
    [batch] = batches_in(door.store)
    watch(door, batch)
    record = door.store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
    del record.observations[1]
    door.store.write_message(keys.batch_record(batch), record)  # and died
    request = pb.DeleteObservationsRequest(model=MODEL, ids=["b"])
    assert stub.DeleteObservations(request, timeout=TIMEOUT_S).deleted == 1
    for key in (keys.observed_images(batch), keys.observation_scores(batch)):
        np.testing.assert_array_equal(door.store.read_arrays(key)["id"], batches.digests(["a"]))


def test_retention(redis_url: str, tmp_path: Path) -> None:
    """Observations past the model's retention are deleted, younger ones stay."""
    planted = []
    with running_gateway(tmp_path, redis_url) as door:
        plant_model(door.store)
        with monitor_stub(door.address) as stub:
            config = monitor_pb2.MonitorConfig(retention={"seconds": 7200})
            answer = stub.ConfigureMonitor(
                pb.ConfigureMonitorRequest(model=MODEL, config=config), timeout=TIMEOUT_S
            ).config
            assert (answer.retention.seconds, answer.expected_run_length) == (7200, 100_000)
            found = stub.GetMonitor(pb.GetMonitorRequest(name=f"{MODEL}/monitor"), timeout=TIMEOUT_S).monitor
            assert (found.name, found.config) == (f"{MODEL}/monitor", answer)
        for hours in (1, 4):
            hour = (datetime.now(UTC) - timedelta(hours=hours)).strftime(HOUR)
            planted.append(f"{keys.observations(MODEL, hour)}/one")
            door.store.write_message(keys.batch_record(planted[-1]), monitor_pb2.ObservationBatch(observations=[{}]))
    with running_gateway(tmp_path, redis_url) as door:  # which looks when it begins
        eventually(lambda: not door.store.keys(planted[1]))
        assert batches_in(door.store) == planted[:1]


def test_a_configuration_that_is_refused(stub: Any) -> None:
    """By the field that is out of bounds."""
    for config, words in [
        (monitor_pb2.MonitorConfig(expected_run_length=-1), "expected_run_length is -1"),
        (monitor_pb2.MonitorConfig(retention={"seconds": 60}), "retention is 60 s"),
        (monitor_pb2.MonitorConfig(webhook_url="ftp://host/x"), "'ftp://host/x' is no URL"),
    ]:
        error = refused(stub.ConfigureMonitor, pb.ConfigureMonitorRequest(model=MODEL, config=config))
        assert (error.code(), words in error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)
