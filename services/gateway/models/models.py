"""Models, the gate for their candidates, and rollbacks."""

import asyncio

from defuse import names
from defuse.v1 import corrector_service_pb2, corrector_service_pb2_grpc, gate_pb2, model_pb2, release_pb2
from defuse.v1 import gateway_service_pb2 as pb

from services.gateway.records.paging import Cursor, Page
from services.gateway.releases.releases import CandidateRetirement
from services.runtime.tls import ServiceClient
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog


class Models:
    """Registers and lists models, judges candidates, and rolls versions back.

    The corrector does the work.
    """

    def __init__(
        self,
        store: ArtifactStore,
        corrector: "ServiceClient[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]",
        candidates: CandidateRetirement,
    ) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._corrector = corrector
        self._candidates = candidates

    async def register(self, request: pb.CreateModelRequest) -> model_pb2.Model:
        """Serve an uploaded file as version 1 of a new model."""
        registration = corrector_service_pb2.RegisterModelRequest(
            model=request.model, file_digest=request.file_digest, request_id=request.request_id
        )
        answer = await self._corrector.call(lambda stub, **how: stub.RegisterModel(registration, **how))
        model: model_pb2.Model = answer.model
        return model

    async def get(self, name: str) -> model_pb2.Model:
        """Return a model; raise NotFound for an unknown name."""
        return await asyncio.to_thread(self._catalog.model, name)

    async def page(self, cursor: Cursor) -> Page[model_pb2.Model]:
        """Return one page of all models, by name."""
        return await asyncio.to_thread(self._page, cursor)

    async def releases_page(self, model_name: str, cursor: Cursor) -> Page[release_pb2.Release]:
        """Return one page of the releases of a model, oldest first.

        Raises NotFound for an unknown model.
        """
        model = await self.get(model_name)
        return cursor.page_of_append_only(await asyncio.to_thread(self._catalog.releases, model.name))

    async def judge(self, request: pb.JudgeCandidateRequest, *, deadline_s: float | None) -> gate_pb2.GateVerdict:
        """Run the gate of a model on an uploaded file."""
        candidate = corrector_service_pb2.RunGateRequest(
            model=request.model, file_digest=request.file_digest, dataset=request.dataset
        )
        answer = await self._corrector.call(lambda stub, **how: stub.RunGate(candidate, **how), deadline_s=deadline_s)
        verdict: gate_pb2.GateVerdict = answer.verdict
        return verdict

    async def verdict(self, name: str) -> gate_pb2.GateVerdict:
        """Return a stored verdict of the gate.

        Raises NotFound for an unknown name.
        """
        return await asyncio.to_thread(self._catalog.verdict, name)

    async def roll_back(self, request: pb.RollbackModelRequest) -> release_pb2.Release:
        """Restore the previous version, and retire the present candidates."""
        restore = corrector_service_pb2.RestorePreviousRequest(
            model=request.model, actor=request.actor, reason=request.reason, request_id=request.request_id
        )
        answer = await self._corrector.call(lambda stub, **how: stub.RestorePrevious(restore, **how))
        release: release_pb2.Release = answer.release
        await self._candidates.retire(release.model)
        return release

    def _page(self, cursor: Cursor) -> Page[model_pb2.Model]:
        registered = [key for key in self._store.keys("models") if self._store.exists(keys.model(key))]
        placed = cursor.after_cursor((names.model(names.last(key)) for key in registered), lambda name: [name])
        return cursor.page((place, self._catalog.model(name)) for place, name in placed)
