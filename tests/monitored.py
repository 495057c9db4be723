"""A model with production traffic: planted spots, reported observations, and the findings."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import redis
from defuse.v1 import model_pb2, monitor_pb2, release_pb2, work_pb2
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc

from services.runtime.queue import WATCH
from services.storage import keys
from services.storage.artifacts import ArtifactStore

MODEL = "models/tiny"
CLASSES = ("ant", "bee", "cat")
TIMEOUT_S = 30
Array = npt.NDArray[Any]


def plant_model(store: ArtifactStore, name: str = MODEL) -> model_pb2.Model:
    """Register a classifier of images of 4 x 5 x 3, as the corrector would."""
    model = model_pb2.Model(
        name=name,
        classes=CLASSES,
        image_shape=[4, 5, 3],
        input_datatype="FP32",
        preprocessing=model_pb2.Preprocessing(
            layout=model_pb2.Preprocessing.LAYOUT_NCHW, low=0, high=1, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.1]
        ),
    )
    store.write_message(keys.model(name), model)
    store.write_message(f"{keys.releases(name)}/1.pb", release_pb2.Release(model=name, version=1))
    return model


def pictures(count: int, seed: int = 0) -> Array:
    """Return images (n, 4, 5, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), np.uint8)


def observation(one: str, image: Array | None = None, **fields: Any) -> monitor_pb2.Observation:
    """Return an observation; of a picture that its id decides, unless one is given."""
    seed = int.from_bytes(keys.observation_digest(one)[:4])
    picture = pictures(1, seed)[0] if image is None else image
    return monitor_pb2.Observation(id=one, **{"picture": picture.tobytes(), "scores": [0.5, 1, -1], **fields})


def messages(
    batch_id: str, observations: Sequence[monitor_pb2.Observation], *, model: str = MODEL, at_once: int = 2
) -> Iterator[pb.ReportRequest]:
    """Yield the messages of a batch; model and batch id in the first."""
    for begin in range(0, max(len(observations), 1), at_once):
        request = pb.ReportRequest(observations=observations[begin : begin + at_once])
        if begin == 0:
            request.model, request.batch_id = model, batch_id
        yield request


def report(stub: Any, batch_id: str, ids: Iterable[str]) -> int:
    """Report observations by their ids alone; return how many are said to be stored."""
    observations = [observation(one) for one in ids]
    return int(stub.Report(messages(batch_id, observations), timeout=TIMEOUT_S).stored)


@contextmanager
def monitor_stub(address: str) -> Iterator[Any]:
    # A gateway that was killed is back soon.
    options = [(f"grpc.{bound}_reconnect_backoff_ms", 100) for bound in ("initial", "min", "max")]
    with grpc.insecure_channel(address, options) as channel:
        yield pb_grpc.MonitorServiceStub(channel)


def batches_in(store: ArtifactStore, model: str = MODEL) -> list[str]:
    """Return the keys of all batches that exist."""
    hours = store.keys(keys.observed_hours(model))
    return [batch for hour in hours for batch in store.keys(hour) if store.exists(keys.batch_record(batch))]


def stored_ids(store: ArtifactStore, model: str = MODEL) -> list[str]:
    """Return the id of each observation that is stored, as often as it is."""
    records = [
        store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch) for batch in batches_in(store, model)
    ]
    return [one.id for record in records for one in record.observations]


def works(redis_url: str) -> list[work_pb2.WatchWork]:
    """Return what waits on the stream `watch`."""
    with redis.Redis.from_url(redis_url) as client:
        return [work_pb2.WatchWork.FromString(values[b"payload"]) for _, values in client.xrange(WATCH)]
