"""What Prometheus itself says of its configuration, of the alerts and of the metrics, by `promtool`."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from services.runtime import telemetry
from tests.conftest import ROOT

DIRECTORY = ROOT / "deploy" / "prometheus"
SERVICES = ("generator", "distiller", "corrector", "gateway")
# Every service answers.
CALM = {f'up{{job="defuse", service="{service}"}}': "1x60" for service in SERVICES}
# What is wrong, and labels and summary of the alert that says so; the series have a sample a minute for an hour.
WRONG: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "DefuseServiceDown": (
        {'up{job="defuse", service="corrector"}': "0x60"},
        {"job": "defuse", "service": "corrector"},
        "corrector does not answer",
    ),
    "DefuseDependencyAway": (
        {'defuse_dependency_up{service="gateway", dependency="redis"}': "0x60"},
        {"service": "gateway", "dependency": "redis"},
        "gateway does not reach redis: its work waits",
    ),
    "DefuseDeadLetter": (
        {'defuse_queue_dead{stream="prepare"}': "2x60"},
        {"stream": "prepare"},
        "prepare has messages that were given up",
    ),
    "DefuseQueueStands": (
        {'defuse_queue_oldest_seconds{stream="distill"}': "0+60x60", 'defuse_messages_total{stream="distill"}': "5x60"},
        {"stream": "distill"},
        "Nothing of distill was done for half an hour, and there is work",
    ),
    "DefuseQueueGrows": (
        {'defuse_queue_backlog{stream="identify"}': "0+1x60"},
        {"stream": "identify"},
        "identify gets more work than is done: start another worker",
    ),
    "DefuseCallsFail": (
        {'defuse_rpc_seconds_count{service="gateway", method="/x/GetRun", code="INTERNAL"}': "0+1x60"},
        {"service": "gateway", "method": "/x/GetRun"},
        "/x/GetRun of gateway fails by defects: see its log",
    ),
    "DefuseChallengerFails": (
        {'defuse_trials_total{trial="models/tiny/trials/t1", seen="challenger_errors"}': "0+1x60"},
        {"trial": "models/tiny/trials/t1"},
        "The challenger of models/tiny/trials/t1 fails; the champion answers for it",
    ),
    "DefuseTrafficChanged": (
        {'defuse_alerts_total{model="models/tiny", kind="region_hits"}': "0+1x60"},
        {"model": "models/tiny", "kind": "region_hits"},
        "The traffic of models/tiny has changed (region_hits): see `defuse alerts list`",
    ),
}


def promtool(*arguments: str | Path, given: bytes = b"") -> str:
    """Run promtool, which must accept what it is given; return what it says."""
    program = shutil.which("promtool", path=f"{ROOT}/.venv/more/usr/bin{os.pathsep}{os.environ['PATH']}")
    assert program, "promtool is missing: `make test-more` fetches it"
    done = subprocess.run([program, *arguments], input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_prometheus_takes_its_configuration() -> None:
    """The configuration and the rules that it names are valid."""
    assert f"{len(WRONG)} rules found" in promtool("check", "config", DIRECTORY / "prometheus.yaml")


def expected(name: str, *, raised: bool) -> Any:
    _, labels, summary = WRONG[name]
    alert = {"exp_labels": labels, "exp_annotations": {"summary": summary}}
    return {"eval_time": "50m", "alertname": name, "exp_alerts": [alert] if raised else []}


@pytest.mark.parametrize("name", WRONG)
def test_an_alert_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    """It is raised, with labels and words, and no other one is."""
    series = {**CALM, **WRONG[name][0]}
    test = {
        "interval": "1m",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "alert_rule_test": [expected(other, raised=other == name) for other in WRONG],
    }
    file = tmp_path / "test.yaml"
    # JSON is YAML.
    file.write_text(json.dumps({"rule_files": [str(DIRECTORY / "alerts.yaml")], "tests": [test]}))
    promtool("test", "rules", file)


def test_every_alert_is_tried() -> None:
    rules = yaml.safe_load((DIRECTORY / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == list(WRONG)


def test_metrics_are_named_as_prometheus_wants() -> None:
    """What a service shows can be read, and its names and help texts are in order."""
    telemetry.RPC_SECONDS.labels("/x/GetRun", "OK").observe(1)
    metrics = prometheus_client.generate_latest()
    assert b"defuse_rpc_seconds_bucket" in metrics
    promtool("check", "metrics", given=metrics)
