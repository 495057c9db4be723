"""google.longrunning.Operations: translates and delegates."""

from typing import Any

import grpc
from google.longrunning import operations_pb2_grpc as pb_grpc
from google.longrunning import operations_proto_pb2 as pb
from google.protobuf import empty_pb2

from services.gateway.operations.operations import Operations
from services.gateway.records.paging import Cursor

SERVICE = pb.DESCRIPTOR.services_by_name["Operations"]
# What the answer needs on its way, before the caller's deadline.
_ANSWER_S = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class OperationsService(pb_grpc.OperationsServicer):  # type: ignore[misc]  # its stubs have no types
    """What takes long, for any client that knows Google's operations."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def GetOperation(self, request: pb.GetOperationRequest, context: Context) -> pb.Operation:
        return await self._operations.get(request.name)

    async def ListOperations(self, request: pb.ListOperationsRequest, context: Context) -> pb.ListOperationsResponse:
        cursor = Cursor.of(request, request.name, request.filter)
        page = await self._operations.list(request.name, request.filter, cursor)
        return pb.ListOperationsResponse(operations=page.entries, next_page_token=page.next_page_token)

    async def WaitOperation(self, request: pb.WaitOperationRequest, context: Context) -> pb.Operation:
        return await self._operations.wait(request.name, _patience_s(request, context))

    async def CancelOperation(self, request: pb.CancelOperationRequest, context: Context) -> empty_pb2.Empty:
        await self._operations.cancel(request.name)
        return empty_pb2.Empty()

    async def DeleteOperation(self, request: pb.DeleteOperationRequest, context: Context) -> empty_pb2.Empty:
        await self._operations.delete(request.name)
        return empty_pb2.Empty()


def _patience_s(request: pb.WaitOperationRequest, context: Context) -> float | None:
    """Return how long a caller may be made to wait: by its timeout and its deadline, whichever is first."""
    left = context.time_remaining()
    bounds = [] if left is None else [max(0.0, left - _ANSWER_S)]
    if request.HasField("timeout"):
        bounds.append(request.timeout.ToNanoseconds() / 1e9)
    return min(bounds, default=None)
