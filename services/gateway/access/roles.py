"""Callers and roles: which role a call needs, by the contract, and who makes the present call."""

from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, TypeVar

from defuse.errors import PermissionDenied
from defuse.v1 import access_pb2, gateway_service_pb2, generator_service_pb2, monitor_service_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import DecodeError, Message

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


def set_caller(caller: Caller) -> None:
    """Let what follows in this call know who makes it."""
    _present.set(caller)


def current_caller() -> Caller | None:
    """Return who makes the present call; None where callers show no tokens."""
    return _present.get()


def require(role: Role, what: str) -> None:
    """Raise PermissionDenied unless the caller has a role, or one above it; without tokens everybody has all."""
    caller = current_caller()
    if caller and caller.role < role:
        needed = role_name(role)
        raise PermissionDenied(
            f"{what} needs the role {needed}, and {caller.name!r} has {role_name(caller.role)}; ask an admin for it",
            reason="ROLE_TOO_LOW",
            metadata={"role": needed},
        )


def sign_request(request: M) -> M:
    """Put the caller's name where a request says whose it is, in place; raise PermissionDenied for somebody else's.

    An approver is the caller, too, or nobody.
    """
    if caller := current_caller():
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


def role_name(role: Role) -> str:
    """Return a role as people write it."""
    return access_pb2.Role.Name(role).removeprefix("ROLE_").lower()


_VIEWER, _OPERATOR, _ADMIN = access_pb2.ROLE_VIEWER, access_pb2.ROLE_OPERATOR, access_pb2.ROLE_ADMIN
# Names of services that whoever can connect may ask: probes have no tokens.
_OPEN = ("grpc.health.v1.Health",)
_SERVICES: Mapping[str, Role] = {
    "google.longrunning.Operations": _VIEWER,
    "grpc.reflection.v1alpha.ServerReflection": _VIEWER,
    "inference.GRPCInferenceService": _VIEWER,
}
# Of these services, what changes something.
_METHODS: Mapping[str, Role] = {
    **{
        f"/inference.GRPCInferenceService/{kind}SharedMemory{change}": _OPERATOR
        for kind in ("System", "Cuda")
        for change in ("Register", "Unregister")
    },
    "/google.longrunning.Operations/CancelOperation": _OPERATOR,
    "/google.longrunning.Operations/DeleteOperation": _OPERATOR,
}


def of_contract(service: ServiceDescriptor) -> dict[str, Role]:
    """Return the roles that the calls of a service of the contract need, by their paths; those offered have one."""
    roles = {method.name: method.GetOptions().Extensions[access_pb2.required_role] for method in service.methods}
    return {f"/{service.full_name}/{name}": role for name, role in roles.items() if role}


_GATEWAY = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]
_GENERATOR = generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"]
_MONITOR = monitor_service_pb2.DESCRIPTOR.services_by_name["MonitorService"]
_ROLES = {**of_contract(_GATEWAY), **of_contract(_GENERATOR), **of_contract(_MONITOR), **_METHODS}
_IDENTIFY = f"/{_GENERATOR.full_name}/Identify"
# What is reported says itself when and of what; an event for each batch would outgrow it.
_REPORT = f"/{_MONITOR.full_name}/Report"
_LOOKING = {
    f"/{service.full_name}/{method.name}"
    for service in (_GATEWAY, _GENERATOR, _MONITOR)
    for method in service.methods
    if method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
} | {_REPORT}


@cache  # of the calls that are offered, and no others
def needed(method: str) -> Role | None:
    """Return the least role that may make a call; None where nobody needs a token. What has no role is for admins."""
    if (role := _ROLES.get(method)) is not None:
        return role
    service = method.removeprefix("/").partition("/")[0]
    return None if service in _OPEN else _SERVICES.get(service, _ADMIN)


def needed_by(method: str, request: Any) -> Role | None:
    """Return the least role for a call with this request: a stream that cancels its run at its end is an operator's."""
    if method == _IDENTIFY and _cancels(request):
        return _OPERATOR
    return needed(method)


def changes(method: str, request: Any) -> bool:
    """Say whether a call with this request changes something; inference and what only looks do not."""
    role = needed_by(method, request)
    return role is not None and role > _VIEWER and method not in _LOOKING


@cache  # as above
def may_change(method: str) -> bool:
    """Say whether a call changes something, with some request at least."""
    return method == _IDENTIFY or changes(method, None)


def _cancels(request: bytes) -> bool:
    with suppress(DecodeError):  # whose caller the generator tells
        return generator_service_pb2.IdentifyRequest.FromString(request).cancel_run
    return False
