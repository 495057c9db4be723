"""Calls and commands for monitors and alerts, with a fake gateway."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import grpc
import pytest
from defuse import Client, InvalidInput, aio, connection
from defuse.cli import app
from defuse.errors import Unavailable, to_status
from defuse.v1 import monitor_pb2, tensor_pb2
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc
from defuse.values import Alert, Estimate, MonitorConfig, MonitorState, RegionHits
from grpc_status import rpc_status
from typer.testing import CliRunner, Result

RATE = tensor_pb2.Estimate(value=0.125, low=0.0625, high=0.25, successes=5, trials=40)
STAMP, WHEN = {"seconds": 1_700_000_000}, datetime.fromtimestamp(1_700_000_000, UTC)
CONFIG = monitor_pb2.MonitorConfig(
    expected_run_length=5000,
    retention={"seconds": 43_200},
    keep=monitor_pb2.MonitorConfig.KEEP_LATENTS,
    webhook_url="https://alerts.example/",
    start_runs=True,
)
SETTINGS = {
    "expected_run_length": 5000.0,
    "retention_s": 43_200.0,
    "keep": "latents",
    "webhook_url": "https://alerts.example/",
    "start_runs": True,
}
MONITOR = monitor_pb2.Monitor(
    name="models/tiny/monitor",
    config=CONFIG,
    guard="models/tiny/guards/g2",
    observations=1234,
    hits=[
        monitor_pb2.RegionHits(
            region="runs/first/regions/r1", label="7", hits=321, calm_rate=RATE, versions={"2": 300, "1": 21}
        )
    ],
    prediction_drift=0.25,
    latent_drift=-0.5,
    estimated_accuracy=0.875,
    truths=40,
    right=30,
    versions={"1": 234, "2": 1000},
    update_time=STAMP,
)


def alert(number: int) -> monitor_pb2.Alert:
    return monitor_pb2.Alert(
        name=f"models/tiny/alerts/a{number}",
        kind=monitor_pb2.Alert.KIND_REGION_HITS,
        subject="runs/first/regions/r1",
        summary=f"r1 is seen {number} times as often",
        evidence=6000.5,
        observations=77,
        calm=0.125,
        now=0.5,
        run="runs/again",
        create_time=STAMP,
        since=STAMP,
    )


class Gateway(pb_grpc.MonitorServiceServicer):
    """Has one monitor and three alerts on two pages.

    The first stream of alerts breaks.
    """

    def __init__(self) -> None:
        self.monitor = MONITOR
        self.configured: list[monitor_pb2.MonitorConfig] = []
        self.received: list[Any] = []
        self.watches: list[str] = []
        self.over = threading.Event()
        self.refusals = 0

    def GetMonitor(self, request: pb.GetMonitorRequest, context: Any) -> pb.GetMonitorResponse:  # noqa: N802  # gRPC's name
        assert request.name == "models/tiny/monitor"
        if self.refusals:
            self.refusals -= 1
            context.abort_with_status(rpc_status.to_status(to_status(Unavailable("starting"))))
        return pb.GetMonitorResponse(monitor=self.monitor)

    def ConfigureMonitor(self, request: pb.ConfigureMonitorRequest, context: Any) -> pb.ConfigureMonitorResponse:  # noqa: N802
        assert request.model == "models/tiny"
        self.configured.append(request.config)
        return pb.ConfigureMonitorResponse(config=CONFIG)

    def ListAlerts(self, request: pb.ListAlertsRequest, context: Any) -> pb.ListAlertsResponse:  # noqa: N802
        assert request.model == "models/tiny"
        if request.page_token:
            return pb.ListAlertsResponse(alerts=[alert(1)])
        return pb.ListAlertsResponse(alerts=[alert(3), alert(2)], next_page_token="more")

    def WatchAlerts(self, request: pb.WatchAlertsRequest, context: Any) -> Iterator[pb.WatchAlertsResponse]:  # noqa: N802
        self.watches.append(request.model)
        if len(self.watches) == 1:
            yield pb.WatchAlertsResponse(alert=alert(4))
            context.abort_with_status(rpc_status.to_status(to_status(Unavailable("Redis does not answer"))))
        yield pb.WatchAlertsResponse(alert=alert(5))
        if request.model:  # the stream of all models ends, for the command line
            self.over.wait(60)

    def StartAlertRun(self, request: pb.StartAlertRunRequest, context: Any) -> pb.StartAlertRunResponse:  # noqa: N802
        self.received.append(request.name)
        return pb.StartAlertRunResponse(run={"name": "runs/again", "state": "STATE_IDENTIFYING"})

    def AttachTruth(self, request: pb.AttachTruthRequest, context: Any) -> pb.AttachTruthResponse:  # noqa: N802
        self.received.append(dict(request.truths))
        return pb.AttachTruthResponse(attached=len(request.truths) - 1)

    def DeleteObservations(self, request: pb.DeleteObservationsRequest, context: Any) -> pb.DeleteObservationsResponse:  # noqa: N802
        self.received.append(list(request.ids))
        return pb.DeleteObservationsResponse(deleted=len(request.ids) - 1)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Serve the fake gateway at the default address of clients."""
    found = Gateway()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_MonitorServiceServicer_to_server(found, server)
    monkeypatch.setenv("DEFUSE_GATEWAY", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(connection, "_RECONNECT_S", 0.0)
    server.start()
    yield found
    found.over.set()
    server.stop(0).wait()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client() as found:
        yield found


def defuse(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, result.output
    return result


def test_monitor_state(client: Client) -> None:
    """The state has every field of the contract, with plain ids."""
    assert client.monitor("tiny") == MonitorState(
        model="tiny",
        config=MonitorConfig(**SETTINGS),
        guard="g2",
        observations=1234,
        hits=(
            RegionHits(
                run="first",
                region="r1",
                label="7",
                hits=321,
                reference_rate=Estimate.from_proto(RATE),
                versions={"1": 21, "2": 300},
            ),
        ),
        prediction_drift=0.25,
        latent_drift=-0.5,
        estimated_accuracy=0.875,
        truths=40,
        right=30,
        versions={"1": 234, "2": 1000},
        update_time=WHEN,
    )


def test_monitor_without_traffic(gateway: Gateway, client: Client) -> None:
    """Unknown figures are None, and have words on the command line."""
    gateway.monitor = monitor_pb2.Monitor(name="models/tiny/monitor", config=CONFIG)
    found = client.monitor("tiny")
    assert (found.guard, found.hits, found.estimated_accuracy, found.update_time) == ("", (), None, None)
    assert found.real_accuracy is None
    output = defuse("monitor", "show", "tiny").output
    assert "not known" in output
    assert "not known of 0" in output
    assert "defuse guards create" in output


def test_reads_are_retried(gateway: Gateway, client: Client) -> None:
    """Reads are retried while the gateway is unavailable."""
    gateway.refusals = 2
    assert client.monitor("tiny").observations == 1234


def test_configure_monitor(gateway: Gateway, client: Client) -> None:
    """Settings are sent under the contract's names; omitted ones are not sent."""
    assert client.configure_monitor("tiny", **SETTINGS) == MonitorConfig(**SETTINGS)  # type: ignore[arg-type]
    client.configure_monitor("tiny")
    assert gateway.configured == [CONFIG, monitor_pb2.MonitorConfig(keep=monitor_pb2.MonitorConfig.KEEP_IMAGES)]
    with pytest.raises(InvalidInput, match="'pictures' is unknown; use images or latents"):
        client.configure_monitor("tiny", keep="pictures")


def test_alerts_of_all_pages(client: Client) -> None:
    """A list has the entries of all pages."""
    found = client.alerts("tiny")
    assert [one.id for one in found] == ["a3", "a2", "a1"]
    assert found[0] == Alert(
        id="a3",
        model="tiny",
        kind="region_hits",
        subject="runs/first/regions/r1",
        summary="r1 is seen 3 times as often",
        evidence=6000.5,
        observations=77,
        reference_rate=0.125,
        now=0.5,
        run="again",
        create_time=WHEN,
        since=WHEN,
    )


def test_watch_alerts_reconnects(gateway: Gateway, client: Client) -> None:
    """A broken stream is requested again; the reader sees one stream."""
    assert [one.id for one in islice(client.watch_alerts("tiny"), 2)] == ["a4", "a5"]
    assert gateway.watches == ["models/tiny"] * 2


def test_watch_alerts_on_an_event_loop(gateway: Gateway) -> None:
    async def scenario() -> list[str]:
        async with aio.Client() as client:
            return [one.id async for one in client.watch_alerts()]

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == ["a4", "a5"]
    assert gateway.watches == ["", ""]


def test_start_alert_run(gateway: Gateway, client: Client) -> None:
    assert client.start_alert_run("tiny", "a3").id == "again"
    assert gateway.received == ["models/tiny/alerts/a3"]


def test_ids_are_sent_in_batches(gateway: Gateway, client: Client) -> None:
    """Several calls send many ids; the known ones are added up."""
    ids = [f"o{number}" for number in range(20_001)]
    assert client.attach_truth("tiny", dict.fromkeys(ids, "ant")) == 20_001 - 3
    assert client.delete_observations("tiny", ids) == 20_001 - 3
    assert [len(call) for call in gateway.received] == [10_000, 10_000, 1] * 2
    assert [id_ for call in gateway.received[3:] for id_ in call] == ids


@pytest.mark.usefixtures("gateway")
def test_monitor_show_command() -> None:
    """The table has each region's share beside that of reference images."""
    output = defuse("monitor", "show", "tiny").output
    [row] = [line for line in output.splitlines() if " r1 " in line]
    assert [word for word in ("7", "321", "0.2601", "0.125") if word not in row] == []
    for words in ("1234", "1: 234, 2: 1000", "0.250", "-0.500", "0.875", "0.5 days", "latents"):
        assert words in output
    assert json.loads(defuse("monitor", "show", "tiny", "--json").stdout)["hits"][0]["hits"] == 321


def test_monitor_configure_command(gateway: Gateway) -> None:
    """Every option is sent; a duration has a unit."""
    options = ("--run-length", "5000", "--retention", "12h", "--keep", "latents", "--start-runs")
    found = defuse("monitor", "configure", "tiny", *options, "--webhook", "https://alerts.example/", "--json")
    assert gateway.configured == [CONFIG]
    assert json.loads(found.stdout) == SETTINGS
    assert "5000" in defuse("monitor", "configure", "tiny").output


@pytest.mark.usefixtures("gateway")
def test_invalid_duration() -> None:
    error = defuse("monitor", "configure", "tiny", "--retention", "a week", status=1).exception
    assert isinstance(error, InvalidInput)
    assert "'a week' is not a duration" in error.message


@pytest.mark.usefixtures("gateway")
def test_alerts_list_command() -> None:
    lines = defuse("alerts", "list", "tiny").output.splitlines()
    for number in (1, 2, 3):
        [row] = [line for line in lines if f" a{number} " in line]
        assert all(word in row for word in ("region hits", f"seen {number} times", "again", "2023-11-14")), row
    assert [one["id"] for one in json.loads(defuse("alerts", "list", "tiny", "--json").stdout)] == ["a3", "a2", "a1"]


@pytest.mark.usefixtures("gateway")
def test_alerts_watch_command() -> None:
    """Each alert is one line, as text or as JSON."""
    assert defuse("alerts", "watch").stdout.splitlines() == [
        f"2023-11-14 22:13:20 UTC tiny: r1 is seen {number} times as often" for number in (4, 5)
    ]
    [line] = defuse("alerts", "watch", "--json").stdout.splitlines()
    assert (json.loads(line)["id"], json.loads(line)["create_time"]) == ("a5", "2023-11-14T22:13:20+00:00")


def test_alerts_run_command(gateway: Gateway) -> None:
    assert "defuse runs watch again" in defuse("alerts", "run", "tiny", "a3").output
    assert json.loads(defuse("alerts", "run", "tiny", "a3", "--json").stdout)["id"] == "again"
    assert gateway.received == ["models/tiny/alerts/a3"] * 2
