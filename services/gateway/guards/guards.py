"""Guards: the corrector creates them, and the store keeps them."""

import asyncio

from defuse.v1 import corrector_service_pb2, corrector_service_pb2_grpc, guard_pb2
from defuse.v1 import gateway_service_pb2 as pb

from services.gateway.records.paging import Cursor, Page
from services.runtime.tls import ServiceClient
from services.storage.catalog import Catalog


class Guards:
    """Creates, finds and lists guards."""

    def __init__(
        self, catalog: Catalog, corrector: "ServiceClient[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]"
    ) -> None:
        self._catalog = catalog
        self._corrector = corrector

    async def create(self, request: pb.CreateGuardRequest, *, deadline_s: float | None) -> guard_pb2.Guard:
        """Build and serve a guard for the labelled regions of a run."""
        order = corrector_service_pb2.IssueGuardRequest(
            run=request.run, false_alarm_rate=request.false_alarm_rate, request_id=request.request_id
        )
        answer = await self._corrector.call(lambda stub, **how: stub.IssueGuard(order, **how), deadline_s=deadline_s)
        guard: guard_pb2.Guard = answer.guard
        return guard

    async def get(self, name: str) -> guard_pb2.Guard:
        """Return a guard; raise NotFound for an unknown name."""
        return await asyncio.to_thread(self._catalog.guard, name)

    async def page(self, model_name: str, cursor: Cursor) -> Page[guard_pb2.Guard]:
        """Return one page of the guards of a model, oldest first.

        Raises NotFound for an unknown model.
        """
        return cursor.page_of_append_only(await asyncio.to_thread(self._catalog.guards, model_name))
