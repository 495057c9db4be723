"""HTML representations of values for notebooks, as tables with pictures."""

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from defuse.values import Correction, GateVerdict, Images, Region, RegionPictures, Run

# Height of a picture, in pixels.
_HEIGHT = 64
_MAX_PICTURES = 16


def attach_html() -> None:
    """Give the values the method `_repr_html_`, which notebooks call."""
    renderers: dict[type, Callable[..., str]] = {
        Run: run_html,
        Region: region_html,
        RegionPictures: pictures_html,
        Correction: correction_html,
        GateVerdict: verdict_html,
    }
    for cls, render in renderers.items():
        cls._repr_html_ = render  # type: ignore[attr-defined]  # the name is IPython's


def run_html(run: Run) -> str:
    """Return a run's state and counts as a table."""
    facts = {
        "state": run.state if run.ended else f"{run.state}, {run.progress:.0%}",
        "model": f"{run.model}, version {run.model_version}",
        "data set": run.dataset,
        "failures": f"{run.counts.failures} in {run.counts.decodes} perturbations of {run.counts.sources} images",
        "regions": run.region_count,
        "note": run.note,
        "error": run.error,
    }
    return _facts_table(f"run {run.id}", facts)


def region_html(region: Region) -> str:
    """Return a region's figures and annotation as a table."""
    inside = region.real_error_rate
    facts = {
        "true label": region.true_label,
        "predicted label": region.predicted_label,
        "score": f"{region.score:.3f}",
        "failures": f"{region.size} of {region.source_count} images",
        "error rate": region.error_rate,
        "error rate of controls": region.control_error_rate,
        "real images inside": f"{inside.successes} of {inside.trials} misclassified" if inside.trials else "",
        "stability": f"{region.stability:.2f}",
        "annotation": _annotation(region),
    }
    return _facts_table(f"region {region.id} of run {region.run}", facts)


def pictures_html(pictures: RegionPictures) -> str:
    """Return a region's table and its pictures."""
    rows = {
        f"failures, predicted {pictures.region.predicted_label}": pictures.exemplars,
        f"source images, labelled {pictures.region.true_label}": pictures.sources,
        "nearest training images": pictures.nearest,
        "nearest misclassified training images": pictures.nearest_misclassified,
    }
    return region_html(pictures.region) + "".join(_image_row(title, images) for title, images in rows.items())


def correction_html(correction: Correction) -> str:
    """Return a correction's choice, its effects and the gate's verdict."""
    facts = {
        "state": correction.state if correction.ended else f"{correction.state}, {correction.progress:.0%}",
        "model": f"{correction.model}, from version {correction.base_version}",
        "note": correction.note,
        "error": correction.error,
    }
    if correction.choice:
        facts |= {
            "chosen": f"{correction.choice.method}, lambda {correction.choice.region_weight:g}, "
            f"rate {correction.choice.learning_rate:g}",
            "change on the test split": str(correction.test_change),
        }
    changes = [(change.region, change.label, change.before, change.after) for change in correction.regions]
    title = f"correction {correction.id} of run {correction.run}"
    tables = _facts_table(title, facts) + _table(("region", "label", "before", "after"), changes)
    return tables + (verdict_html(correction.verdict) if correction.verdict else "")


def verdict_html(verdict: GateVerdict) -> str:
    """Return a verdict of the gate with a row for each check."""
    facts = {
        "verdict": "passed" if verdict.passed else f"not passed: {len(verdict.failed)} of {len(verdict.checks)} checks",
        "model": f"{verdict.model}, compared with version {verdict.base_version}",
        "data set": verdict.dataset,
    }
    checks = [
        ("yes" if check.passed else "no", check.kind, check.subject, check, f"{check.bound:.4g}", check.rule)
        for check in verdict.checks
    ]
    columns = ("passed", "check", "subject", "figure", "bound", "rule")
    return _facts_table(f"gate {verdict.id}", facts) + _table(columns, checks)


def _annotation(region: Region) -> str:
    if not region.annotation:
        return f"open; suggested: {region.suggested_label}" if region.suggested_label else "open"
    return f"{region.annotation.label or region.annotation.verdict}, by {region.annotation.annotator}"


def _facts_table(title: str, facts: Mapping[str, Any]) -> str:
    """Return a table of names and values, without empty values."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
        if value != ""
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table of rows, or an empty string without rows."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return f"<table><tr>{titles}</tr>{body}</table>" if body else ""


def _image_row(title: str, images: Images) -> str:
    """Return images (n, h, w, c) in a row, or an empty string without images."""
    from defuse.pictures import data_uri  # hooks import this package, too, and need no Pillow

    tags = "".join(
        f'<img src="{data_uri(pixels)}" alt="" height="{_HEIGHT}" style="image-rendering: pixelated; margin: 2px">'
        for pixels in images[:_MAX_PICTURES]
    )
    return f"<p>{escape(title)}</p><div>{tags}</div>" if tags else ""
