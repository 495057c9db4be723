"""The audit log: an event for each call that changes something.

Events are written to the service's log and to the artifact store.
"""

import asyncio
import functools
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any
from urllib.parse import unquote

import grpc
from defuse.errors import DefuseError, LimitExceeded, PermissionDenied, Unauthenticated, to_status
from defuse.v1 import access_pb2, audit_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2

from services.gateway.access import roles
from services.gateway.records.paging import Cursor, Page
from services.runtime import telemetry, tracing
from services.runtime.interceptors import Continuation, to_known_error, wrap_handler
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_KEY = re.compile(rf"{keys.AUDIT}/\d{{4}}-\d\d-\d\d/\d{{6}}\.\d{{6}}-[0-9a-f]{{6}}\.pb")


class AuditLog:
    """Stores and lists audit events."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def keep(self, event: audit_pb2.AuditEvent) -> None:
        """Store an event.

        When storing fails, the event is in the service's log only, and the audited call continues.
        """
        key = keys.audit_event(event.time.ToDatetime(UTC), uuid.uuid4().hex[:6])
        try:
            await asyncio.to_thread(self._store.write_message, key, event)
        except (DefuseError, OSError) as error:
            telemetry.log().error("audit_not_stored", method=event.method, caller=event.caller, error=str(error))

    def page(self, cursor: Cursor) -> Page[audit_pb2.AuditEvent]:
        """Return the next page of events, newest first."""
        before = str(cursor.after[0]) if cursor.after else ""
        return cursor.page(
            ([key], self._store.read_message(key, audit_pb2.AuditEvent)) for key in self._keys(before=before)
        )

    def _keys(self, *, before: str) -> Iterator[str]:
        for day in reversed(self._store.keys(keys.AUDIT)):
            if not before or day <= before:
                yield from (
                    key
                    for key in reversed(self._store.keys(day))
                    if _KEY.fullmatch(key) and (not before or key < before)
                )


_NAME = re.compile(r"(models|runs|datasets|operations)/.+")
# Fields that hold the last segment of a resource name, and the collection of that name.
_PARTS = {"run_id": "runs", "digest": "files", "file_digest": "files"}
# Rejected calls are logged but not stored, so that strangers cannot fill the store.
_LOGGED_ALONE = (LimitExceeded, PermissionDenied, Unauthenticated)
_MOST_NAMES = 20


class AuditInterceptor(grpc.aio.ServerInterceptor):
    """Records each call that changes something, after its end.

    A unary call is answered once its event is recorded.
    """

    def __init__(self, audit_log: AuditLog) -> None:
        self._audit_log = audit_log

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not roles.may_mutate(method):
            return handler
        return wrap_handler(handler, functools.partial(self._audited, method))

    @asynccontextmanager
    async def _audited(self, method: str, request: Any, context: Any) -> AsyncIterator[Any]:
        error: BaseException | None = None
        names: list[str] = []
        try:
            yield _collect_names(request, names)
        except BaseException as caught:
            error = caught
            raise
        finally:
            if roles.is_mutation(method, request):
                event = _event(method, names, context, error)
                # Also after the caller has disconnected: the change remains.
                await asyncio.shield(self._write(event, stored=not isinstance(error, _LOGGED_ALONE)))

    async def _write(self, event: audit_pb2.AuditEvent, *, stored: bool) -> None:
        telemetry.log().info(
            "audit",
            caller=event.caller,
            role=roles.role_name(event.role) if event.role else "",
            method=event.method,
            resources=list(event.resources),
            code=event.code,
            reason=event.reason,
            peer=event.peer,
        )
        if stored:
            await self._audit_log.keep(event)


def _collect_names(request: Any, names: list[str]) -> Any:
    """Collect the resource names of a request.

    Of a request stream, the names in its first messages are collected as they arrive.
    """
    if not hasattr(request, "__aiter__"):
        names.extend(resource_names(request))
        return request

    async def noted() -> AsyncIterator[Any]:
        async for one in request:
            if len(names) < _MOST_NAMES:
                names.extend(resource_names(one))
            yield one

    return noted()


def resource_names(message: Any) -> Iterator[str]:
    """Yield the resource names in a request, in field order."""
    for field, value in message.ListFields() if isinstance(message, Message) else ():
        if isinstance(value, Message):
            yield from resource_names(value)
        elif isinstance(value, str) and field.name in _PARTS:
            yield f"{_PARTS[field.name]}/{value}"
        elif isinstance(value, str) and _NAME.fullmatch(value):
            yield value


def _event(method: str, names: list[str], context: Any, error: BaseException | None) -> audit_pb2.AuditEvent:
    known = roles.current_caller()
    code, reason = _outcome(context, error)
    event = audit_pb2.AuditEvent(
        caller=known.name if known else "",
        role=known.role if known else access_pb2.ROLE_UNSPECIFIED,
        method=method.removeprefix("/"),
        resources=list(dict.fromkeys(names))[:_MOST_NAMES],
        code=code,
        reason=reason,
        peer=unquote(context.peer()),
        trace_id=tracing.trace_ids().get("trace_id", ""),
    )
    event.time.GetCurrentTime()
    return event


def _outcome(context: Any, error: BaseException | None) -> tuple[str, str]:
    """Return the status code and the error reason of a call."""
    if error is None:
        return "OK", ""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED", "CALLER_GONE"
    if isinstance(error, grpc.aio.AbortError):
        return context.code().name, ""
    known = to_known_error(error)
    return code_pb2.Code.Name(to_status(known).code), known.reason
