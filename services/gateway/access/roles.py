"""Which role a call needs: the contract says it of our own services, a table here of others'."""

from collections.abc import Mapping

from defuse.v1 import access_pb2, gateway_service_pb2, generator_service_pb2
from google.protobuf.descriptor import ServiceDescriptor

from services.gateway.access.caller import Role

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


_ROLES = {
    **of_contract(gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]),
    **of_contract(generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"]),
    **_METHODS,
}


def needed(method: str) -> Role | None:
    """Return the least role that may make a call; None where nobody needs a token. What has no role is for admins."""
    if (role := _ROLES.get(method)) is not None:
        return role
    service = method.removeprefix("/").partition("/")[0]
    return None if service in _OPEN else _SERVICES.get(service, _ADMIN)
