"""A real Triton that a test may kill and start again, with a classifier on it, and what this host shares with it."""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tritonclient.grpc as triton
from defuse.v1 import model_pb2

from services.corrector.signature import read_signature
from services.corrector.triton_repository import TritonRepository
from services.localstack.servers import Server, ensure_triton, start_triton
from services.localstack.stack import StackSettings
from services.triton.client import Classifier, InferenceClient
from services.triton.system_shared_memory import DIRECTORY
from services.triton.transport import GRPC
from tests.conftest import TIMEOUT_S, eventually
from tests.onnx_files import build_onnx_classifier, declare

Array = npt.NDArray[Any]
# Between answers to one image in different batches: on a GPU ONNX Runtime multiplies in TF32, of ten bits.
_ROUNDING = 2e-2 if torch.cuda.is_available() else 1e-5
TOLERANCE: dict[str, Any] = {"rtol": _ROUNDING, "atol": _ROUNDING}
SHAPE = (3, 8, 10)
CLASSES = ("ant", "bee", "cat")
STUB_MEMORY = re.compile(r"/dev/shm/(triton_\w+_shm_region_[0-9a-f-]+)")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A Triton that may be killed, and a classifier of images (3, 8, 10) on it."""

    server: Server
    root: Path
    repository: TritonRepository

    @property
    def model(self) -> model_pb2.Model:
        return read_signature(declare("models/tiny", classes=CLASSES), build_onnx_classifier(shape=("batch", *SHAPE)))

    @property
    def address(self) -> str:
        return self.server.address

    def classifier(self, client: InferenceClient) -> Classifier:
        return client.classifier(self.model, version=1)

    def regions(self, pid: int | None = None) -> list[str]:
        """Return the shared memory of a process, this one if none is named, that Triton knows."""
        with closing(triton.InferenceServerClient(self.address)) as client:
            names = client.get_system_shared_memory_status().regions
        return sorted(name for name in names if name.startswith(f"defuse-{pid or os.getpid()}-"))

    def kill(self) -> None:
        """Kill Triton; its stubs' files in /dev/shm are left, as Triton never removes them."""
        pid = self.server.child.pid
        left = set(STUB_MEMORY.findall(Path(f"/proc/{pid}/maps").read_text()))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.server.child.alive())
        for name in left:
            (DIRECTORY / name).unlink(missing_ok=True)

    def entry(self, name: str) -> Path:
        """Return a model's directory in the repository."""
        return self.root / "models" / name

    def restart(self) -> None:
        self.server.child.restart()
        self.server.child.wait_ready(time.monotonic() + TIMEOUT_S)

    def put(self, name: str, file: bytes, classes: Sequence[str]) -> model_pb2.Model:
        """Serve a file as version 1."""
        model = read_signature(declare(f"models/{name}", classes=classes), file)
        self.repository.add_version(name, 1, file)
        self.repository.serve(model, name, [1])
        return model

    def over_grpc(self, batch: Array) -> Array:
        """Return the logits that are to be expected."""
        with closing(InferenceClient(self.address, transport=GRPC)) as client:
            return self.classifier(client).classify(batch)


@contextmanager
def running_triton(root: Path) -> Iterator[Server]:
    """Run a Triton without models, its repository in `models` of a directory, as long as the block runs."""
    wheel = ensure_triton(StackSettings().cache.expanduser(), print)
    server = start_triton(wheel, repository=root / "models", backends=root / "backends", log=root / "triton.log")
    try:
        server.child.wait_ready(time.monotonic() + TIMEOUT_S)
        yield server
    finally:
        server.child.stop(grace_s=30)


@contextmanager
def restartable_triton(root: Path) -> Iterator[Served]:
    """Run a Triton with a classifier on it as long as the block runs."""
    with running_triton(root) as server:
        repository = TritonRepository(root / "models", InferenceClient(server.address))
        served = Served(server=server, root=root, repository=repository)
        served.put("tiny", build_onnx_classifier(shape=("batch", *SHAPE)), CLASSES)
        yield served


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def shared_files(pid: int | None = None) -> list[str]:
    """Return the names of the memory that a process, this one if none is named, shares."""
    return sorted(path.name for path in DIRECTORY.glob(f"defuse-{pid or os.getpid()}-*"))


def asked(batch: Any, name: str) -> list[triton.InferInput]:
    """Return images as one input of a request by Triton's own client."""
    given = triton.InferInput(name, list(batch.shape), "FP32")
    given.set_data_from_numpy(batch)
    return [given]
