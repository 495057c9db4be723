"""google.longrunning.Operations: runs, corrections and releases as operations."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from defuse import names
from defuse.errors import Cancelled, DefuseError, Internal, InvalidInput, NotFound, NotReady, to_status
from defuse.v1 import correction_pb2, operation_pb2, release_pb2, run_pb2
from google.longrunning import operations_pb2_grpc as pb_grpc
from google.longrunning import operations_proto_pb2 as pb
from google.longrunning.operations_proto_pb2 import Operation
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from services.gateway.corrections.corrections import Corrections
from services.gateway.records.paging import Cursor, Page, Placed, Position
from services.gateway.releases.releases import ReleaseOperations, error_of
from services.gateway.runs.runs import Runs
from services.runtime.queue import KEY, Queue

_Run, _Correction, _Publication = run_pb2.Run, correction_pb2.Correction, release_pb2.Publication
_Metadata = operation_pb2.OperationMetadata
State: TypeAlias = "operation_pb2.OperationMetadata.State.ValueType"
_RUN_STATES = {
    _Run.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Run.STATE_FAILED: _Metadata.STATE_FAILED,
    _Run.STATE_CANCELLED: _Metadata.STATE_CANCELLED,
}
_PUBLICATION_STATES = {
    _Publication.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Publication.STATE_FAILED: _Metadata.STATE_FAILED,
}
_CORRECTION_STATES = {
    _Correction.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Correction.STATE_FAILED: _Metadata.STATE_FAILED,
    _Correction.STATE_CANCELLED: _Metadata.STATE_CANCELLED,
}


def of_run(run: run_pb2.Run) -> Operation:
    """Return the search of a run as an operation."""
    state = _RUN_STATES.get(run.state, _Metadata.STATE_RUNNING)
    operation = _operation(names.search_operation(run.name), run, state, target=run.name, verb="search")
    return _ended(operation, state, run, _fault(run))


def of_correction(correction: correction_pb2.Correction) -> Operation:
    """Return a correction as an operation."""
    state = _CORRECTION_STATES.get(correction.state, _Metadata.STATE_RUNNING)
    name = names.correction_operation(correction.name)
    operation = _operation(name, correction, state, target=correction.name, verb="correct")
    return _ended(operation, state, correction, _fault(correction))


def of_publication(publication: release_pb2.Publication) -> Operation:
    """Return a release as an operation."""
    state = _PUBLICATION_STATES.get(publication.state, _Metadata.STATE_RUNNING)
    name = names.publication_operation(publication.name)
    operation = _operation(name, publication, state, target=names.parent(publication.name), verb="release")
    return _ended(operation, state, publication.release, error_of(publication))


def _operation(name: str, record: Any, state: State, *, target: str, verb: str) -> Operation:
    """Return an operation that is still under way."""
    operation = Operation(name=name)
    operation.metadata.Pack(
        _Metadata(
            target=target,
            verb=verb,
            state=state,
            progress=record.progress,
            note=record.note,
            create_time=record.create_time,
            update_time=record.update_time,
        )
    )
    return operation


def _ended(operation: Operation, state: State, response: Message, error: DefuseError) -> Operation:
    """Set the outcome of an operation that has ended, in place."""
    operation.done = state != _Metadata.STATE_RUNNING
    if state == _Metadata.STATE_SUCCEEDED:
        operation.response.Pack(response)
    elif state == _Metadata.STATE_CANCELLED:
        operation.error.CopyFrom(to_status(Cancelled(f"{operation.name} was cancelled")))
    elif state == _Metadata.STATE_FAILED:
        operation.error.CopyFrom(to_status(error))
    return operation


def _fault(record: run_pb2.Run | correction_pb2.Correction) -> DefuseError:
    # An error that is not a defect of ours names its cause in its reason, as the stream of failures does.
    cls = Internal if record.error_reason in {"", "INTERNAL"} else NotReady
    return cls(record.error, reason=record.error_reason or None)


# Names of deleted operations; their results remain.
_FORGOTTEN = f"{KEY}operations:forgotten"
_FILTERS = {"": None, "done=true": True, "done=false": False}
_EVERYWHERE = {"", "runs/-"}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The record behind an operation."""

    records: Runs | Corrections | ReleaseOperations
    name: str
    view: Callable[[Any], Operation]


class Operations:
    """Finds, lists, awaits, cancels and deletes operations.

    Their names are `runs/{run}/operations/{operation}` and `models/{model}/operations/{operation}`.
    """

    def __init__(self, queue: Queue, runs: Runs, corrections: Corrections, publications: ReleaseOperations) -> None:
        self._redis = queue.redis
        self._runs = runs
        self._corrections = corrections
        self._publications = publications

    async def get(self, name: str) -> Operation:
        """Return an operation; raise NotFound for an unknown or deleted one."""
        source = await self._source(name)
        try:
            return source.view(await source.records.get(source.name))
        except NotFound as error:
            raise _unknown(name) from error

    async def list(self, parent: str, wanted: str, cursor: Cursor) -> Page[Operation]:
        """Return one page of filtered operations.

        They belong to one run, to all runs or to a model. Runs come newest first, each with its search before its
        corrections. Corrections and releases come oldest first.
        """
        if parent in _EVERYWHERE:
            found = self._of_all(cursor.after)
        elif parent.startswith("models/"):
            found = self._of_model(names.check(parent, "models/*"), cursor.after)
        else:
            found = self._of_run(await self._runs.get(parent), cursor.after)
        return await cursor.page_of(self._filtered(found, _filter(wanted)))

    async def wait(self, name: str, timeout_s: float | None) -> Operation:
        """Return an operation once it has ended.

        After `timeout_s` seconds it is returned in its present state.
        """
        end = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        operation, source = await self.get(name), await self._source(name)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                async for record in source.records.watch(source.name):
                    operation = source.view(record)
        return operation

    async def cancel(self, name: str) -> None:
        """Cancel an operation; one that has ended stays as it is.

        Raises NotReady when the operation cannot be cancelled.
        """
        await self.get(name)
        source = await self._source(name)
        await source.records.cancel(source.name)

    async def delete(self, name: str) -> None:
        """Delete an operation that has ended; raise NotReady while it has not."""
        if not (await self.get(name)).done:
            raise NotReady(f"operation {name!r} has not ended; cancel it first, or wait", reason="OPERATION_UNDER_WAY")
        await self._redis.sadd(_FORGOTTEN, name)

    async def _source(self, name: str) -> _Source:
        of_model = name.startswith("models/")
        names.check(name, "models/*/operations/*" if of_model else "runs/*/operations/*")
        if await self._redis.sismember(_FORGOTTEN, name):
            raise _unknown(name)
        owner, operation = names.parent(name), names.last(name)
        if of_model:
            publication = names.publication(names.last(owner), operation)
            return _Source(records=self._publications, name=publication, view=of_publication)
        if operation == names.SEARCH:
            return _Source(records=self._runs, name=owner, view=of_run)
        correction = names.correction(names.last(owner), operation)
        return _Source(records=self._corrections, name=correction, view=of_correction)

    async def _filtered(
        self, found: AsyncGenerator[Placed[Operation], None], done: bool | None
    ) -> AsyncGenerator[Placed[Operation], None]:
        async with aclosing(found) as placed:
            async for position, operation in placed:
                if done in {None, operation.done} and not await self._redis.sismember(_FORGOTTEN, operation.name):
                    yield position, operation

    async def _of_all(self, after: Position) -> AsyncGenerator[Placed[Operation], None]:
        """Yield the operations of all runs.

        A position consists of the run's position and the position within the run.
        """
        if after:
            run = await self._runs.get(after[1])
            async for position, operation in self._of_run(run, after[2:]):
                yield [*after[:2], *position], operation
        async for place, run in self._runs.records.iterate_after("", after[:2], newest_first=True):
            async for position, operation in self._of_run(run, ()):
                yield [*place, *position], operation

    async def _of_run(self, run: run_pb2.Run, after: Position) -> AsyncGenerator[Placed[Operation], None]:
        """Yield the search of a run, then its corrections.

        A position consists of the search's position and the correction's.
        """
        if not after:
            yield [names.SEARCH], of_run(run)
        async for position, correction in self._corrections.records.iterate_after(run.name, after[1:]):
            yield [names.SEARCH, *position], of_correction(correction)

    async def _of_model(self, model: str, after: Position) -> AsyncGenerator[Placed[Operation], None]:
        async for position, publication in self._publications.records.iterate_after(model, after):
            yield position, of_publication(publication)


def _filter(wanted: str) -> bool | None:
    plain = wanted.replace(" ", "").lower()
    if plain not in _FILTERS:
        raise InvalidInput(
            f"the filter {wanted!r} is not understood; use done=true, done=false, or none", reason="BAD_FILTER"
        )
    return _FILTERS[plain]


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no operation {name!r}; list those of its run or model", reason="OPERATION_NOT_FOUND")


SERVICE = pb.DESCRIPTOR.services_by_name["Operations"]
# Time that the answer needs to arrive before the caller's deadline.
_ANSWER_S = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class OperationsService(pb_grpc.OperationsServicer):  # type: ignore[misc]  # its stubs have no types
    """The gRPC service of the standard interface to long-running operations."""

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
    """Return how long a call may wait, in seconds.

    It is the smaller of the requested timeout and the remaining deadline.
    """
    left = context.time_remaining()
    bounds = [] if left is None else [max(0.0, left - _ANSWER_S)]
    if request.HasField("timeout"):
        bounds.append(request.timeout.ToNanoseconds() / 1e9)
    return min(bounds, default=None)
