"""The doorkeeper: who is let in with which call."""

from collections.abc import Iterable
from typing import Any

import grpc
from defuse.errors import DefuseError, Unauthenticated

from services.gateway.access import caller, roles
from services.gateway.access.caller import Caller
from services.gateway.access.tokens import Tokens
from services.runtime.interceptors import Continuation, refusal

_HEADER, _SCHEME = "authorization", "bearer"


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets callers in by their tokens, as far as their roles go; the methods behind it know who calls."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            self._admit(handler_call_details)
        except DefuseError as error:
            return refusal(handler, error)
        return handler

    def _admit(self, call: grpc.HandlerCallDetails) -> None:
        if (role := roles.needed(call.method)) is not None:
            caller.enter(caller_of(self._tokens, _said(call.invocation_metadata or ())))
            caller.require(role, call.method.rpartition("/")[2])


def _said(metadata: Iterable[tuple[str, Any]]) -> str:
    return next((value for key, value in metadata if key == _HEADER), "")


def caller_of(tokens: Tokens, said: str) -> Caller:
    """Return who says `Bearer TOKEN`; raise Unauthenticated for nothing of the kind, and for a token of nobody."""
    scheme, _, token = said.partition(" ")
    if scheme.lower() != _SCHEME:
        raise Unauthenticated(
            "the call has no token (`authorization: Bearer TOKEN`); set DEFUSE_TOKEN, and ask an admin for one",
            reason="NO_TOKEN",
        )
    if found := tokens.caller(token):
        return found
    raise Unauthenticated(
        "the token is not known here; was it replaced? Set DEFUSE_TOKEN to a new one", reason="UNKNOWN_TOKEN"
    )
