"""Who makes the present call, and what may be said in his name."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from defuse.errors import PermissionDenied
from defuse.v1 import access_pb2
from google.protobuf.message import Message

Role: TypeAlias = access_pb2.Role.ValueType
M = TypeVar("M", bound=Message)
# Fields of requests that say who asks for something, says something, or lets something through.
_SAYING, _APPROVER = {"actor", "annotator", "approver"}, "approver"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whom a token belongs to."""

    name: str
    role: Role


_present: ContextVar[Caller | None] = ContextVar("caller", default=None)


def enter(caller: Caller) -> None:
    """Let what follows in this call know who makes it."""
    _present.set(caller)


def present() -> Caller | None:
    """Return who makes the present call; None where callers show no tokens."""
    return _present.get()


def require(role: Role, what: str) -> None:
    """Raise PermissionDenied unless the caller has a role, or one above it; without tokens everybody has all."""
    caller = present()
    if caller and caller.role < role:
        needed = word(role)
        raise PermissionDenied(
            f"{what} needs the role {needed}, and {caller.name!r} has {word(caller.role)}; ask an admin for it",
            reason="ROLE_TOO_LOW",
            metadata={"role": needed},
        )


def signed(request: M) -> M:
    """Put the caller's name where a request says whose it is, in place; raise PermissionDenied for somebody else's.

    An approver is the caller, too, or nobody.
    """
    if caller := present():
        for field in _SAYING.intersection(request.DESCRIPTOR.fields_by_name):
            said = getattr(request, field)
            if said not in {"", caller.name}:
                raise PermissionDenied(
                    f"{field} is {said!r}, and the token is that of {caller.name!r}; leave {field} out",
                    reason="NOT_THE_CALLER",
                )
            if field != _APPROVER:
                setattr(request, field, caller.name)
    return request


def word(role: Role) -> str:
    """Return a role as people write it."""
    return access_pb2.Role.Name(role).removeprefix("ROLE_").lower()
