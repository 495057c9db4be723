"""The field that a refusal names is one of a request, so that a form can show the sentence beside it."""

import re

import pytest
from defuse.v1 import gateway_service_pb2, monitor_service_pb2
from google.protobuf.descriptor import Descriptor

from services.gateway.corrections import config as correction_config
from services.gateway.runs import config as run_config
from tests.conftest import ROOT

REQUESTS = [
    method.input_type
    for file in (gateway_service_pb2, monitor_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
SOURCES = "\n".join(path.read_text() for path in (ROOT / "services" / "gateway").rglob("*.py"))
NAMED = sorted(set(re.findall(r'field="([a-z_.]+)"', SOURCES)))


def has(message: Descriptor | None, path: str) -> bool:
    """Say whether a message has a field at a path of names."""
    name, _, rest = path.partition(".")
    field = message.fields_by_name.get(name) if message else None
    return field is not None and (not rest or has(field.message_type, rest))


@pytest.mark.parametrize(
    "path", [*NAMED, *(f"config.{path}" for path in run_config._BOUNDS | correction_config._BOUNDS)]
)
def test_a_field_that_is_named_exists(path: str) -> None:
    assert any(has(request, path) for request in REQUESTS)


def test_fields_are_named() -> None:
    """The sources are found, and what has no such path is no field."""
    assert {"run_id", "offset", "trial.share", "annotation.label"} <= set(NAMED)
    assert not any(has(request, "config.search.radius") for request in REQUESTS)
