"""docs/reference/api.md documents the contract, and its examples are valid requests."""

import re
from pathlib import Path
from typing import Any

import pytest
from defuse.v1 import gateway_service_pb2, generator_service_pb2, monitor_service_pb2
from google.longrunning import operations_proto_pb2
from google.protobuf import json_format, message_factory

from protos.document import EXAMPLES, PAGE, SERVICES, document

TEXT = PAGE.read_text()
CALLS, _, _ = TEXT.partition("\n## Messages\n")
_MODULES: tuple[Any, ...] = (gateway_service_pb2, generator_service_pb2, monitor_service_pb2, operations_proto_pb2)
PUBLIC = {name: service for module in _MODULES for name, service in module.DESCRIPTOR.services_by_name.items()}


def test_the_documented_api_is_the_api() -> None:
    """The page is the generated one: `python -m protos.document`."""
    assert document() == TEXT


@pytest.mark.parametrize("service", SERVICES)
def test_every_call_is_there(service: str) -> None:
    """With each field of its request and its response, and what they mean."""
    offered = SERVICES[service] or {method.name for method in PUBLIC[service].methods}
    for method in PUBLIC[service].methods:
        assert (f"\n### {method.name}\n" in CALLS) is (method.name in offered)
        for field in method.input_type.fields if method.name in offered else ():
            assert f"\n- `{field.name}` (" in CALLS


def test_links_lead_somewhere() -> None:
    """Each linked type has a heading, and each field has a meaning."""
    headings = {re.sub(r"[^a-z]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", TEXT)) <= headings
    assert re.findall(r"^- .*\):\n(?!  )", TEXT, re.MULTILINE) == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_requests_are_requests(path: Path) -> None:
    """An example parses into the request of the call that its file is named after."""
    service, _, method = path.stem.partition(".")
    request = message_factory.GetMessageClass(PUBLIC[service].methods_by_name[method].input_type)()
    json_format.Parse(path.read_text(), request)
    assert request.ListFields()
