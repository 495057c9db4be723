"""Callers, roles, and the role that each method requires.

The contract states the roles of Defuse's own methods. A table in this module states those of other services, such as
inference, where viewers may call every method that changes nothing.
"""

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
# Request fields that name the acting person, and the field that names an approver.
_SAYING, _APPROVER = {"actor", "annotator", "approver"}, "approver"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The person or program that a token belongs to."""

    name: str
    role: Role


_present: ContextVar[Caller | None] = ContextVar("caller", default=None)


def set_caller(caller: Caller) -> None:
    """Set the caller of the present call."""
    _present.set(caller)


def current_caller() -> Caller | None:
    """Return the caller of the present call, or None without tokens."""
    return _present.get()


def require(role: Role, what: str) -> None:
    """Raise PermissionDenied unless the caller has a role or a higher one.

    Every caller has all roles when tokens are not in use.
    """
    caller = current_caller()
    if caller and caller.role < role:
        needed = role_name(role)
        raise PermissionDenied(
            f"{what} needs the role {needed}, and {caller.name!r} has {role_name(caller.role)}; ask an admin for it",
            reason="ROLE_TOO_LOW",
            metadata={"role": needed},
        )


def sign_request(request: M) -> M:
    """Write the caller's name into the request's name fields, in place.

    An approver stays as it is, and must be empty or the caller. Raises PermissionDenied for the name of anybody else.
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
    """Return the lower-case name of a role."""
    return access_pb2.Role.Name(role).removeprefix("ROLE_").lower()


_VIEWER, _OPERATOR, _ADMIN = access_pb2.ROLE_VIEWER, access_pb2.ROLE_OPERATOR, access_pb2.ROLE_ADMIN
# Services that need no token: probes have none.
_OPEN = ("grpc.health.v1.Health",)
_SERVICES: Mapping[str, Role] = {
    "google.longrunning.Operations": _VIEWER,
    "grpc.reflection.v1alpha.ServerReflection": _VIEWER,
    "inference.GRPCInferenceService": _VIEWER,
}
# Methods of these services that change something.
_METHODS: Mapping[str, Role] = {
    **{
        f"/inference.GRPCInferenceService/{kind}SharedMemory{change}": _OPERATOR
        for kind in ("System", "Cuda")
        for change in ("Register", "Unregister")
    },
    "/google.longrunning.Operations/CancelOperation": _OPERATOR,
    "/google.longrunning.Operations/DeleteOperation": _OPERATOR,
}


def contract_roles(service: ServiceDescriptor) -> dict[str, Role]:
    """Return the role that the contract requires for each method, by path."""
    roles = {method.name: method.GetOptions().Extensions[access_pb2.required_role] for method in service.methods}
    return {f"/{service.full_name}/{name}": role for name, role in roles.items() if role}


_GATEWAY = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]
_GENERATOR = generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"]
_MONITOR = monitor_service_pb2.DESCRIPTOR.services_by_name["MonitorService"]
_ROLES = {**contract_roles(_GATEWAY), **contract_roles(_GENERATOR), **contract_roles(_MONITOR), **_METHODS}
_IDENTIFY = f"/{_GENERATOR.full_name}/Identify"
# Reports carry their own time and model; one audit event for each batch would outnumber them.
_REPORT = f"/{_MONITOR.full_name}/Report"
_LOOKING = {
    f"/{service.full_name}/{method.name}"
    for service in (_GATEWAY, _GENERATOR, _MONITOR)
    for method in service.methods
    if method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
} | {_REPORT}


@cache  # only methods that are offered
def required_role(method: str) -> Role | None:
    """Return the lowest role that may call a method.

    The result is None when the method needs no token. A method without a stated role requires an admin.
    """
    if (role := _ROLES.get(method)) is not None:
        return role
    service = method.removeprefix("/").partition("/")[0]
    return None if service in _OPEN else _SERVICES.get(service, _ADMIN)


def required_role_of_call(method: str, request: Any) -> Role | None:
    """Return the lowest role that may make a call with this request.

    A stream of failures that cancels its run requires an operator.
    """
    if method == _IDENTIFY and _cancels(request):
        return _OPERATOR
    return required_role(method)


def is_mutation(method: str, request: Any) -> bool:
    """Return whether a call with this request changes something.

    Inference, reports of traffic and reads count as no change.
    """
    role = required_role_of_call(method, request)
    return role is not None and role > _VIEWER and method not in _LOOKING


@cache  # as in `needed_by`
def may_mutate(method: str) -> bool:
    """Return whether a method can change something, for any request."""
    return method == _IDENTIFY or is_mutation(method, None)


def _cancels(request: bytes) -> bool:
    with suppress(DecodeError):  # the generator reports its own callers
        return generator_service_pb2.IdentifyRequest.FromString(request).cancel_run
    return False
