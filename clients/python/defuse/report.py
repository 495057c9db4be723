"""The report of a run: an HTML page and a JSON file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from defuse.client import Client
from defuse.pictures import data_uri
from defuse.values import Correction, Estimate, Model, RegionPictures, Release, Run
from defuse.version import VERSION

_PAGE, _JSON = "report.html", "report.json"


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of a report."""

    run: Run
    model: Model
    regions: list[RegionPictures]
    corrections: list[Correction]
    releases: list[Release]


def write_report(client: Client, run_id: str, directory: Path) -> Path:
    """Write `report.html` and `report.json` of a succeeded run.

    Returns the path of the page.
    """
    data = _collect(client, run_id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _JSON).write_text(json.dumps(_json_report(data), indent=2))
    page = directory / _PAGE
    page.write_text(_render(data), encoding="utf-8")
    return page


def to_json(value: Any) -> Any:
    """Return a value in the types of JSON.

    Dataclasses become objects, datetimes ISO 8601 texts, and tuples lists. A field's metadata `json` renames its key.
    """
    if is_dataclass(value):
        return {field.metadata.get("json", field.name): to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def _json_report(data: ReportData) -> Mapping[str, Any]:
    """Return the content of the JSON file."""
    return {
        "defuse": VERSION,
        "run": to_json(data.run),
        "model": to_json(data.model),
        "regions": [{**to_json(pictures.region), "state": pictures.region.state} for pictures in data.regions],
        "corrections": to_json(data.corrections),
        "releases": to_json(data.releases),
    }


def _collect(client: Client, run_id: str) -> ReportData:
    run = client.run(run_id)
    regions = [client.region(run_id, region.id) for region in client.regions(run_id)]
    return ReportData(
        run=run,
        model=client.model(run.model),
        regions=regions,
        corrections=client.corrections(run_id),
        releases=client.releases(run.model),
    )


def _render(data: ReportData) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("defuse"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(picture=data_uri, share=_share, interval=_interval, percent=_percent)
    return environment.get_template("report.html.jinja").render(data=data, version=VERSION, changes=_changes(data))


def _changes(data: ReportData) -> Mapping[str, Any]:
    """Return the latest correction's change of each region, by region id."""
    finished = [correction for correction in data.corrections if correction.state == "succeeded"]
    return {change.region: change for change in finished[-1].regions} if finished else {}


def _share(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval(estimate: Estimate) -> str:
    if not estimate.trials:
        return "not measured"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}], n={estimate.trials}"
