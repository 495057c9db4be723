"""A served classifier with a guard, and corrections of it as the corrector leaves them."""

import asyncio
import time

import numpy as np
from defuse import Client, names
from defuse.v1 import correction_pb2

from benchmarks.guarded import Guarded
from benchmarks.stand import Array, Stand
from services.corrector.gate.comparison import RegressionBank
from services.gateway.records.store import RecordStore
from services.localstack.stack import LocalStack
from services.runtime.queue import Queue
from services.storage import keys


class World:
    """The guarded classifier of a stand on a stack, and another file of it, which is every correction's result."""

    def __init__(self, stack: LocalStack, stand: Stand, client: Client, guarded: Guarded, file: bytes) -> None:
        self.client, self.file = client, file
        self.model_id = names.last(guarded.model.name)
        self._redis, self._stand, self._guarded = stack.addresses()["redis"], stand, guarded

    def image(self) -> Array:
        """Return one image (1, c, h, w), as the classifier takes it."""
        height, width, channels = self._guarded.model.image_shape
        return np.random.default_rng(0).standard_normal((1, channels, height, width)).astype(np.float32)

    def guards(self) -> int:
        """Return how many guards the model has had."""
        return len(self._stand.context.catalog.guards(self._guarded.model.name))

    def ask_gate(self) -> tuple[float, float]:
        """Have the gate judge the other file; return when it began and ended."""
        dataset = self._stand.context.catalog.run(self._guarded.guard.run).config.dataset
        begin = time.monotonic()
        self.client.judge(self.model_id, self.file, dataset=names.last(dataset))
        return begin, time.monotonic()

    def correct(self, turn: int) -> tuple[str, str, tuple[str, str]]:
        """Leave a finished correction that passed the gate, its candidate served; return run, id and candidate."""
        store, run = self._stand.store, self._guarded.guard.run
        model = self._stand.context.catalog.model(self._guarded.model.name)
        candidate = self._stand.releases.serve_candidate(model, self.file)
        correction = correction_pb2.Correction(
            name=f"{run}/corrections/turn-{turn}",
            model=model.name,
            base_version=model.champion_version,
            state=correction_pb2.Correction.STATE_SUCCEEDED,
            regions=self._guarded.guard.regions,
        )
        correction.create_time.GetCurrentTime()
        result = correction.result
        result.candidate, result.candidate_version = candidate.name, candidate.version
        verdict = result.verdict
        verdict.name, verdict.correction = f"{model.name}/verdicts/planted-{turn}", correction.name
        verdict.base_version, verdict.passed = model.champion_version, True
        verdict.bank.update(RegressionBank(store, model).regions())
        store.write_message(keys.verdict(verdict.name), verdict)
        store.write_bytes(keys.corrected_file(correction.name), self.file)
        store.write_message(keys.correction(correction.name), correction)
        asyncio.run(self._records(correction))
        return names.last(run), names.last(correction.name), (candidate.name, str(candidate.version))

    async def _records(self, correction: correction_pb2.Correction) -> None:
        queue = Queue(f"redis://{self._redis}/0")
        records = RecordStore(queue, correction_pb2.Correction, "corrections", lambda _: True)
        await records.create(correction, [])
        await queue.close()
