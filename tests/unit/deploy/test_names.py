"""Names in compose files, dashboards, alerts and docs exist: settings, ports, targets, metrics."""

import json
import re
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from defuse.guard_outputs import OUTPUTS

from services.corrector.__main__ import CorrectorSettings
from services.dependencies import TransportSettings
from services.gateway.settings import GatewaySettings
from services.generator.__main__ import GeneratorSettings
from services.localstack.servers import TritonWheel
from services.localstack.stack import StackSettings
from services.runtime import telemetry
from services.runtime.settings import PREFIX
from tests import composed
from tests.conftest import ROOT

SETTINGS = {
    "gateway": GatewaySettings,
    "generator": GeneratorSettings,
    "distiller": TransportSettings,
    "corrector": CorrectorSettings,
}
# What the client reads by itself.
OF_CLIENT = {
    "DEFUSE_GATEWAY",
    "DEFUSE_TLS_AUTHORITY",
    "DEFUSE_TLS_CERTIFICATE",
    "DEFUSE_TLS_KEY",
    "DEFUSE_TOKEN",
    "DEFUSE_TOKEN_FILE",
}
# What is read where no settings class is yet, or by the compose file itself.
OF_OTHERS = {"DEFUSE_SETTINGS_FILE", "DEFUSE_USER"}
# Endings under which Prometheus finds histograms and counters.
SUFFIXES = ("_bucket", "_count", "_sum")
METRICS_PAGE = ROOT / "docs" / "reference" / "metrics.md"
REMEDIES = ROOT / "docs" / "how-to" / "operate.md"
NAMING_SETTINGS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docker-compose.yml", "deploy/defuse.env")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
OBSERVED = (*(ROOT / "deploy" / "prometheus").glob("*.yaml"), *(ROOT / "deploy" / "grafana").rglob("*.json"))


# What the guard answers callers.
ANSWERED = {*OUTPUTS, "defuse_guard"}


def variables(cls: Any) -> set[str]:
    return {f"{PREFIX}{name.upper()}" for name in cls.model_fields}


EVERY = set().union(*map(variables, SETTINGS.values())) | variables(StackSettings) | OF_CLIENT | OF_OTHERS


def metrics() -> set[str]:
    """Return the names of all metrics of the services, as Prometheus shows them."""
    assert telemetry.RPC_SECONDS
    families = prometheus_client.REGISTRY.collect()
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    others = {family.name for family in prometheus_client.REGISTRY.collect() if family.type != "counter"}
    return {name for name in counters | others if name.startswith("defuse_")}


def named_metrics(text: str) -> set[str]:
    found = set(re.findall(r"\bdefuse_[a-z_]+\b", text)) - ANSWERED
    return {next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name) for name in found}


@pytest.mark.parametrize("file", [composed.BASE, *composed.OVERLAYS])
def test_a_service_gets_settings_that_it_has(file: str) -> None:
    """A variable is one of the service's own, or of the client's; those of `defuse.env` are of some service."""
    for name, service in composed.services(file).items():
        given = {key for key in service.get("environment", {}) if key.startswith(PREFIX)}
        known = variables(SETTINGS[name]) if name in SETTINGS else OF_CLIENT | {"DEFUSE_CACHE"}
        assert given <= known, name
    assert set(composed.environment("gateway")) <= EVERY


@pytest.mark.parametrize("file", NAMING_SETTINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_setting_that_is_named_exists(file: Path) -> None:
    text = file.read_text()
    assert set(re.findall(r"\bDEFUSE_[A-Z_]*[A-Z]\b", text)) <= EVERY


def test_addresses_have_the_ports_that_are_listened_on() -> None:
    """Each HOST:PORT of a service, in every file, is its own; only the gateway's are published, on this host alone."""
    ports = {name: composed.environment(name) for name in SETTINGS}
    texts = [(ROOT / file).read_text() for file in (composed.BASE, "deploy/defuse.env", *composed.OVERLAYS)]
    named = {match for text in texts for match in re.findall(rf"\b({'|'.join(SETTINGS)}):(\d{{4}})\b", text)}
    assert named == {(name, values["DEFUSE_PORT"]) for name, values in ports.items()}
    published = {name: service["ports"] for name, service in composed.services().items() if "ports" in service}
    own = [ports["gateway"][f"DEFUSE_{port}"] for port in ("PORT", "HTTP_PORT", "METRICS_PORT")]
    assert published == {"gateway": [f"127.0.0.1:{port}:{port}" for port in own]}


def test_metrics_are_scraped_where_they_are_served() -> None:
    jobs = {job["job_name"]: job for job in composed.read("deploy/prometheus/prometheus.yaml")["scrape_configs"]}
    scraped = {name: str(entry["port"]) for entry in jobs["defuse"]["dns_sd_configs"] for name in entry["names"]}
    assert scraped == {name: composed.environment(name)["DEFUSE_METRICS_PORT"] for name in SETTINGS}


@pytest.mark.parametrize("file", OBSERVED, ids=lambda path: path.name)
def test_a_metric_that_is_looked_at_exists(file: Path) -> None:
    text = json.dumps(json.loads(file.read_text())) if file.suffix == ".json" else file.read_text()
    assert named_metrics(text) <= metrics()
    assert named_metrics(text) or file.name == "prometheus.yaml"


def test_every_metric_is_described() -> None:
    assert named_metrics(METRICS_PAGE.read_text()) == metrics()
    assert named_metrics(REMEDIES.read_text()) <= metrics()


def test_every_alert_has_its_remedy() -> None:
    rules = composed.read("deploy/prometheus/alerts.yaml")["groups"][0]["rules"]
    remedies = REMEDIES.read_text().partition("## Alerts and remedies")[2]
    assert [rule["alert"] for rule in rules if rule["alert"] not in remedies] == []


def test_images_are_built_from_targets_that_exist() -> None:
    """Each service's image runs that service's module, and nothing else."""
    commands = composed.commands()
    targets = {name: service["build"]["target"] for name, service in composed.services().items() if "build" in service}
    assert set(targets.values()) <= set(commands)
    for name in SETTINGS:
        assert commands[targets[name]] == ["python", "-m", f"services.{name}"]


def test_triton_is_started_as_by_the_local_stack(tmp_path: Path) -> None:
    """But for places and ports, which are Triton's own defaults there; with TLS, some options more."""
    (tmp_path / "lib" / "python3.11").mkdir(parents=True)
    wheel = TritonWheel(environment=tmp_path)
    local = wheel.command(
        repository=Path("/var/lib/defuse/models"), backends=tmp_path, grpc_port=1, http_port=2, metrics_port=3
    )
    options = {option for option in local[1:] if not re.search(r"-(port|address|directory)=", option)}
    assert set(composed.services()["triton"]["command"][1:]) == options
    assert set(composed.services("deploy/compose.tls.yaml")["triton"]["command"][1:]) > options


def test_a_service_is_given_time_to_drain() -> None:
    """Docker kills it later than it would end by itself."""
    for name, settings in SETTINGS.items():
        grace = composed.services()[name]["stop_grace_period"]
        assert float(grace.removesuffix("s")) > settings.model_fields["drain_s"].default, name
