"""A gateway process for a test, with a real Redis and without a Triton; calls without images are answered."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from defuse import Client
from defuse.v1 import correction_pb2, run_pb2, work_pb2

from services.gateway.corrections.corrections import Corrections
from services.gateway.releases.releases import ReleaseOperations
from services.gateway.runs.runs import Runs
from services.localstack.child_process import free_port
from services.runtime.queue import Queue
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.triton.client import InferenceClient
from tests.conftest import ROOT, eventually
from tests.queues import close_queues

NO_TRITON = "127.0.0.1:9"


@dataclass(frozen=True, kw_only=True)
class Door:
    """A gateway and what it keeps its records in."""

    address: str
    redis_url: str
    store: ArtifactStore
    pid: int = 0

    def client(self) -> Client:
        return Client(self.address)

    def plant(self, *records: run_pb2.Run | correction_pb2.Correction) -> None:
        """Put records into the record stores as they stand."""

        async def tell(runs: Runs, corrections: Corrections, _: ReleaseOperations) -> None:
            for record in records:
                store: Any = runs.records if isinstance(record, run_pb2.Run) else corrections.records
                await store.create(record, [])

        self._told(tell)

    def tell(self, event: work_pb2.Event) -> None:
        """Let something happen to a run or a correction, as a stage would."""

        async def tell(runs: Runs, corrections: Corrections, publications: ReleaseOperations) -> None:
            owners = {"corrections": corrections, "publications": publications}
            await owners.get(event.subject.split("/")[-2], runs).apply(event)

        self._told(tell)

    def _told(self, story: Callable[[Runs, Corrections, ReleaseOperations], Awaitable[None]]) -> None:
        async def tell() -> None:
            queue = Queue(self.redis_url)
            # Nothing is searched here: Triton, advice and regions are not asked.
            runs = Runs(queue, self.store, InferenceClient(NO_TRITON), None)  # type: ignore[arg-type]
            try:
                corrections = Corrections(queue, Catalog(self.store), runs, None)  # type: ignore[arg-type]
                await story(runs, corrections, ReleaseOperations(queue, corrections, _retire))
            finally:
                await close_queues(queue)

        asyncio.run(tell())


async def _retire(_: str) -> None:
    """There is no corrector, and so no candidate."""


@contextmanager
def running_gateway(root: Path, redis_url: str, *, address: str = "", **variables: str) -> Iterator[Door]:
    """Run a gateway with its store in a directory, at an address or at any, while the block runs."""
    door = Door(
        address=address or f"127.0.0.1:{free_port()}", redis_url=redis_url, store=ArtifactStore(f"file://{root}/store")
    )
    environment = {
        **os.environ,
        "DEFUSE_PORT": door.address.rpartition(":")[2],
        "DEFUSE_REDIS_URL": redis_url,
        "DEFUSE_TRITON_URL": NO_TRITON,
        "DEFUSE_DRAIN_S": "0.5",
        "DEFUSE_STORE_URL": f"file://{root}/store",
        **variables,
    }
    log = root / f"gateway-{environment['DEFUSE_PORT']}.log"  # several gateways may share a store
    command = [sys.executable, "-m", "services.gateway"]
    with log.open("w") as file, subprocess.Popen(command, env=environment, cwd=ROOT, stderr=file) as process:
        try:
            eventually(lambda: '"listening"' in log.read_text(), alive=process)
            yield replace(door, pid=process.pid)
        finally:
            process.terminate()
            process.wait(30)
