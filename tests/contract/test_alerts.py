"""Alerts over real gateways: one raises them, everybody's callers hear of them."""

from pathlib import Path

import grpc
import pytest
from defuse.v1 import monitor_service_pb2 as pb

from services.gateway.monitoring.alerts import Alerts
from tests.gateway_process import running_gateway
from tests.monitored import MODEL, TIMEOUT_S, monitor_stub, plant_model
from tests.unit.gateway.monitoring.raising import raised, with_alerts


def test_watchers_at_two_gateways(redis_url: str, tmp_path: Path) -> None:
    """An alert that is raised elsewhere comes to both, and is listed by both."""
    with (
        running_gateway(tmp_path, redis_url) as one,
        running_gateway(tmp_path, redis_url) as other,
        monitor_stub(one.address) as first,
        monitor_stub(other.address) as second,
    ):
        plant_model(one.store)
        calls = [
            stub.WatchAlerts(pb.WatchAlertsRequest(model=model), timeout=TIMEOUT_S)
            for stub, model in ((first, MODEL), (second, ""))
        ]
        for call in calls:
            call.initial_metadata()  # which says that it hears everything from now on

        async def story(alerts: Alerts) -> None:
            await alerts.raise_(MODEL, raised("r1"))

        with_alerts(redis_url, one.store, story)
        heard = [next(call).alert for call in calls]
        listed = [
            stub.ListAlerts(pb.ListAlertsRequest(model=MODEL), timeout=TIMEOUT_S).alerts for stub in (first, second)
        ]
        assert [list(alerts) for alerts in listed] == [[heard[0]], [heard[1]]]
        assert heard[0] == heard[1]
        assert heard[0].subject == "r1"
        with pytest.raises(grpc.RpcError, match="there is no model 'none'"):
            next(first.WatchAlerts(pb.WatchAlertsRequest(model="models/none"), timeout=TIMEOUT_S))
