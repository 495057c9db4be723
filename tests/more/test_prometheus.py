"""Checks of the configuration, the alerts and the metrics by Prometheus's own `promtool`."""

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
# Series of services that answer.
HEALTHY = {f'up{{job="defuse", service="{service}"}}': "1x60" for service in SERVICES}
# For each alert: series that raise it, with a sample a minute for an hour, its labels, and its summary.
CASES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
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
    """Run promtool, which must succeed; return its output."""
    program = shutil.which("promtool", path=f"{ROOT}/.venv/more/usr/bin{os.pathsep}{os.environ['PATH']}")
    assert program, "promtool is missing: `make test-more` fetches it"
    done = subprocess.run([program, *arguments], input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_configuration_is_valid() -> None:
    """The configuration and the rules that it names are valid."""
    assert f"{len(CASES)} rules found" in promtool("check", "config", DIRECTORY / "prometheus.yaml")


def expected(name: str, *, raised: bool) -> Any:
    _, labels, summary = CASES[name]
    alert = {"exp_labels": labels, "exp_annotations": {"summary": summary}}
    return {"eval_time": "50m", "alertname": name, "exp_alerts": [alert] if raised else []}


@pytest.mark.parametrize("name", CASES)
def test_each_alert_fires_alone(name: str, tmp_path: Path) -> None:
    """Its series raise it, with labels and summary, and raise no other alert."""
    series = {**HEALTHY, **CASES[name][0]}
    test = {
        "interval": "1m",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "alert_rule_test": [expected(other, raised=other == name) for other in CASES],
    }
    file = tmp_path / "test.yaml"
    # JSON is YAML.
    file.write_text(json.dumps({"rule_files": [str(DIRECTORY / "alerts.yaml")], "tests": [test]}))
    promtool("test", "rules", file)


def test_every_alert_has_a_case() -> None:
    rules = yaml.safe_load((DIRECTORY / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == list(CASES)


def test_metrics_pass_promtool() -> None:
    """Prometheus can read the metrics of a service; names and help texts are in order."""
    telemetry.RPC_SECONDS.labels("/x/GetRun", "OK").observe(1)
    metrics = prometheus_client.generate_latest()
    assert b"defuse_rpc_seconds_bucket" in metrics
    promtool("check", "metrics", given=metrics)
