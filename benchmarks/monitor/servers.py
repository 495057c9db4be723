"""A gateway that may be killed, before a Redis and a store of its own, and a classifier that costs nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from defuse import Client, DefuseError, names
from defuse.v1 import model_pb2, monitor_pb2, release_pb2
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from benchmarks.monitor.processors import elsewhere
from services.localstack.child_process import free_port
from services.localstack.servers import start_redis
from services.storage import keys
from services.storage.artifacts import ArtifactStore

MODEL, SHAPE, CLASSES = "reference", (28, 28, 1), 10
_ROOT = Path(__file__).parents[2]
_READY_S = 120.0
_NO_TRITON = "127.0.0.1:9"


@dataclass(kw_only=True)
class Gateway:
    """A gateway as it runs in production, but that no Triton is behind it."""

    home: Path
    redis_url: str
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(f"file://{self.home}/store")

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = {
            **os.environ,
            "DEFUSE_PORT": self.address.rpartition(":")[2],
            "DEFUSE_REDIS_URL": self.redis_url,
            "DEFUSE_TRITON_URL": _NO_TRITON,
            "DEFUSE_STORE_URL": f"file://{self.home}/store",
        }
        # Its classifier comes first, with which it shares a processor here.
        command = ["nice", "-n", "19", sys.executable, "-m", "services.gateway"]
        with (self.home / "gateway.log").open("ab") as log, elsewhere():
            self.process = subprocess.Popen(command, env=environment, cwd=_ROOT, stderr=log)
        end = time.monotonic() + _READY_S
        while not _answers(self.address):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the gateway does not start; see {log.name}")
            time.sleep(0.1)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.process:
            self.process.wait()

    def send(self, number: signal.Signals) -> None:
        if self.process:
            self.process.send_signal(number)

    def stored(self) -> list[str]:
        """Return the id of each observation in the store's batches, as often as it is there."""
        store = self.store
        hours = store.keys(keys.observed_hours(names.model(MODEL)))
        records = [
            store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
            for hour in hours
            for batch in store.keys(hour)
            if store.exists(keys.batch_record(batch))
        ]
        return [observation.id for record in records for observation in record.observations]


@contextmanager
def running_gateway() -> Iterator[Gateway]:
    """Run a gateway that knows one model, as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="defuse-benchmark-") as home_:
        home = Path(home_)
        with elsewhere():
            redis = start_redis(home, log=home / "redis.log")
        gateway = Gateway(home=home, redis_url=f"redis://{redis.address}/0")
        try:
            redis.child.wait_ready(time.monotonic() + _READY_S)
            _register(gateway.store)
            gateway.start()
            yield gateway
        finally:
            gateway.kill()
            redis.child.stop(5.0)


def _register(store: ArtifactStore) -> None:
    model = model_pb2.Model(
        name=names.model(MODEL),
        classes=[str(label) for label in range(CLASSES)],
        image_shape=SHAPE,
        input_datatype="FP32",
        preprocessing=model_pb2.Preprocessing(layout="LAYOUT_NCHW", low=0, high=1, mean=[0], std=[1]),
    )
    store.write_message(keys.model(model.name), model)
    store.write_message(f"{keys.releases(model.name)}/1.pb", release_pb2.Release(model=model.name, version=1))


def _answers(address: str) -> bool:
    """Say whether a gateway takes calls; it does not say that it serves, as it has no Triton."""
    with Client(address, timeout_s=2.0) as client:
        try:
            client.version()
        except DefuseError:
            return False
    return True


class _Classifier(oip_grpc.GRPCInferenceServiceServicer):
    def __init__(self) -> None:
        scores = np.linspace(0, 1, CLASSES, dtype="<f4")
        self._answer = oip.ModelInferResponse(
            model_name=MODEL, model_version="1", raw_output_contents=[scores.tobytes()]
        )
        self._answer.outputs.add(name="scores", datatype="FP32", shape=[1, CLASSES])

    def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:  # noqa: ARG002, N802  # gRPC's
        return self._answer


@contextmanager
def running_classifier() -> Iterator[str]:
    """Serve the classifier in a process of its own as long as the block runs; give its address."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=_serve_classifier, args=(port,), daemon=True)
    with elsewhere():
        process.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(_READY_S)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


def _serve_classifier(port: int) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(_Classifier(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()
