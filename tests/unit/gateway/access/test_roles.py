"""Which role each call needs; the contract's own options are the table of our services."""

import pytest
from defuse.v1 import access_pb2, gateway_service_pb2, generator_service_pb2, monitor_service_pb2
from google.protobuf.descriptor import ServiceDescriptor

from services.gateway.access.roles import contract_roles, may_mutate, required_role, role_name

GATEWAY = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]
MONITOR = monitor_service_pb2.DESCRIPTOR.services_by_name["MonitorService"]
GENERATOR = generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"]


@pytest.mark.parametrize("service", [GATEWAY, MONITOR], ids=lambda service: str(service.name))
def test_every_call_of_the_gateway_says_its_role(service: ServiceDescriptor) -> None:
    """Every method has a role: methods without one in the contract are not offered, and all of the gateway's are."""
    assert [path.rpartition("/")[2] for path in contract_roles(service)] == [method.name for method in service.methods]


def test_what_of_monitoring_is_told_of() -> None:
    """Calls that delete, label or configure leave an audit event; reports leave their observations."""
    told = {method.name for method in MONITOR.methods if may_mutate(f"/{MONITOR.full_name}/{method.name}")}
    assert told == {"AttachTruth", "DeleteObservations", "ConfigureMonitor", "StartAlertRun"}


def test_what_of_the_generator_is_offered() -> None:
    """Its internal calls have no role."""
    offered = {path.rpartition("/")[2] for path in contract_roles(GENERATOR)}
    assert offered == {"Identify", "Encode", "Decode", "Interpolate"}


@pytest.mark.parametrize(
    ("role", "calls"),
    [
        ("viewer", ["GetVersion", "ListRuns", "GetRegion", "ExportRegions", "WatchRun", "EstimateRun", "ListReleases"]),
        ("annotator", ["AnnotateRegion"]),
        ("operator", ["UploadFile", "CreateDataset", "CreateRun", "CancelRun", "CreateCorrection", "JudgeCandidate"]),
        ("admin", ["CreateModel", "ReleaseCorrection", "RollbackModel", "StartTrial", "StopTrial"]),
    ],
)
def test_the_roles_of_the_gateways_calls(role: str, calls: list[str]) -> None:
    """Reading needs a viewer, annotating an annotator, starting work an operator, changing models an admin."""
    assert {
        role_name(required_role(f"/{GATEWAY.full_name}/{call}") or access_pb2.ROLE_UNSPECIFIED) for call in calls
    } == {role}


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("/inference.GRPCInferenceService/ModelInfer", access_pb2.ROLE_VIEWER),
        ("/inference.GRPCInferenceService/ModelStreamInfer", access_pb2.ROLE_VIEWER),
        ("/inference.GRPCInferenceService/SystemSharedMemoryStatus", access_pb2.ROLE_VIEWER),
        ("/inference.GRPCInferenceService/SystemSharedMemoryRegister", access_pb2.ROLE_OPERATOR),
        ("/inference.GRPCInferenceService/CudaSharedMemoryUnregister", access_pb2.ROLE_OPERATOR),
        ("/google.longrunning.Operations/WaitOperation", access_pb2.ROLE_VIEWER),
        ("/google.longrunning.Operations/CancelOperation", access_pb2.ROLE_OPERATOR),
        ("/google.longrunning.Operations/DeleteOperation", access_pb2.ROLE_OPERATOR),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", access_pb2.ROLE_VIEWER),
        ("/somebody.Else/Anything", access_pb2.ROLE_ADMIN),
        ("/grpc.health.v1.Health/Check", None),
    ],
)
def test_calls_of_other_services(method: str, role: int | None) -> None:
    """Probes need no token; unknown methods are for admins."""
    assert required_role(method) == role
