"""The report of a run: one HTML page with the pictures, one JSON file with the numbers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from defuse.client import Client
from defuse.pictures import data_uri
from defuse.values import Correction, Estimate, Model, Region, RegionPictures, Release, Run
from defuse.version import VERSION

PAGE, NUMBERS = "report.html", "report.json"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that the report shows."""

    run: Run
    model: Model
    regions: list[RegionPictures]
    corrections: list[Correction]
    releases: list[Release]


def write_report(client: Client, run_id: str, directory: Path) -> Path:
    """Write `report.html` and `report.json` of a run that has succeeded; return the path of the page."""
    findings = _collect(client, run_id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / NUMBERS).write_text(json.dumps(to_json(numbers(findings)), indent=2))
    page = directory / PAGE
    page.write_text(_render(findings), encoding="utf-8")
    return page


def numbers(findings: Findings) -> Mapping[str, Any]:
    """Return what the JSON file holds."""
    return {
        "defuse": VERSION,
        "run": asdict(findings.run),
        "model": asdict(findings.model),
        "regions": [{**asdict(found.region), "state": found.region.state} for found in findings.regions],
        "corrections": [asdict(correction) for correction in findings.corrections],
        "releases": [asdict(release) for release in findings.releases],
    }


def to_json(value: Any) -> Any:
    """Return a value as JSON has it: times as ISO 8601, paths and tuples as plain text and lists."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def _collect(client: Client, run_id: str) -> Findings:
    run = client.run(run_id)
    regions = [client.region(run_id, region.id) for region in client.regions(run_id)]
    return Findings(
        run=run,
        model=client.model(run.model),
        regions=regions,
        corrections=client.corrections(run_id),
        releases=client.releases(run.model),
    )


def _render(findings: Findings) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("defuse"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(picture=data_uri, share=_share, interval=_interval, percent=_percent)
    return environment.get_template("report.html.jinja").render(
        findings=findings, version=VERSION, changes=_changes(findings), labelled=_labelled(findings)
    )


def _labelled(findings: Findings) -> list[Region]:
    return [found.region for found in findings.regions if found.region.state == "labelled"]


def _changes(findings: Findings) -> Mapping[str, Any]:
    """Return the latest correction's change of each region."""
    finished = [correction for correction in findings.corrections if correction.state == "succeeded"]
    return {change.region: change for change in finished[-1].regions} if finished else {}


def _share(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval(estimate: Estimate) -> str:
    if not estimate.trials:
        return "not measured"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}], n={estimate.trials}"
