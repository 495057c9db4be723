"""Fixtures: a fake gateway, a fake classifier, and monitors between them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from defuse.hooks import Monitor, reporter
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from tests.unit.client.hooks.servers import Classifier, Gateway, running_classifier


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A running fake gateway."""
    found = Gateway()
    found.start()
    yield found
    found.responding.set()
    found.kill()


@pytest.fixture
def classifier() -> Classifier:
    return Classifier()


@pytest.fixture
def classifier_address(classifier: Classifier) -> Iterator[str]:
    with running_classifier(classifier) as address:
        yield address


@pytest.fixture
def monitored(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Monitor]]:
    """Make monitors that report to the gateway after a short period."""
    monkeypatch.setattr(reporter, "PERIOD_S", 0.05)
    with ExitStack() as stack:

        def make(**options: Any) -> Monitor:
            monitor = Monitor(gateway.address, token="", **options)
            stack.callback(monitor.close, 0.1)
            return monitor

        yield make


@pytest.fixture
def hooked(classifier_address: str) -> Iterator[Callable[[Monitor], oip_grpc.GRPCInferenceServiceStub]]:
    """Make stubs of the classifier with a monitor in their channel."""
    with grpc.insecure_channel(classifier_address) as channel:
        yield lambda monitor: oip_grpc.GRPCInferenceServiceStub(grpc.intercept_channel(channel, monitor))
