"""The hooks before a real gateway, with a real Redis and a real store."""

import os
import signal
from pathlib import Path

import pytest
from defuse.hooks import Monitor
from defuse.v1 import monitor_pb2

from services.localstack.child_process import free_port
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.conftest import eventually
from tests.gateway_process import running_gateway
from tests.monitored import batches_in, pictures, plant_model, stored_ids

COUNT = 600


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    found = ArtifactStore(f"file://{tmp_path}/store")
    plant_model(found)
    return found


def test_what_is_logged_is_stored(redis_url: str, tmp_path: Path, store: ArtifactStore) -> None:
    """Stored once, with ground truth; an observation that does not fit the model is rejected alone."""
    with running_gateway(tmp_path, redis_url) as door, Monitor(door.address, token="") as monitor:
        for number, picture in enumerate(pictures(5)):
            monitor.log("tiny", picture, [0.5, 1, -1], id=f"o{number}", version="3", truth="bee")
        monitor.log("tiny", pictures(1)[0], [0.5, 1], id="of another model")
        monitor.log("tiny", b"", [0.5, 1, -1], id="v", version="v" * 65)
        monitor.close(60)
        assert (monitor.counts.stored, monitor.counts.dropped) == (5, {"invalid_argument": 2})
        assert (monitor.truth_counts.stored, monitor.truth_counts.dropped) == (5, {})
    assert sorted(stored_ids(store)) == [f"o{number}" for number in range(5)]
    said = [
        one.id
        for batch in batches_in(store)
        for key in store.keys(keys.truths(batch))
        for one in store.read_message(key, monitor_pb2.ObservationBatch).observations
    ]
    assert sorted(said) == [f"o{number}" for number in range(5)]


def test_a_gateway_that_is_killed(redis_url: str, tmp_path: Path, store: ArtifactStore) -> None:
    """Observations made meanwhile are stored once, whether they were under way or waiting."""
    address = f"127.0.0.1:{free_port()}"
    [picture] = pictures(1)
    with Monitor(address, token="") as monitor:
        for part in range(3):
            with running_gateway(tmp_path, redis_url, address=address) as door:
                before = monitor.counts.stored
                for number in range(COUNT // 3):
                    monitor.log("tiny", picture, [0.5, 1, -1], id=f"{part}.{number}")
                eventually(lambda before=before: monitor.counts.stored > before)  # type: ignore[misc]
                os.kill(door.pid, signal.SIGKILL)
        with running_gateway(tmp_path, redis_url, address=address):
            eventually(lambda: not monitor.counts.waiting)
    assert (monitor.counts.stored, monitor.counts.dropped) == (COUNT, {})
    assert len(stored_ids(store)) == len(set(stored_ids(store))) == COUNT
