"""What the client returns, as a notebook shows it: small tables, and pictures inside the page."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from defuse.pictures import data_uri
from defuse.values import Correction, GateVerdict, Images, Region, RegionPictures, Run

# Pixels: the side of a picture.
_SIDE = 64
_PICTURES = 16


def of_run(run: Run) -> str:
    """Return a run: where it stands, and what it found."""
    facts = {
        "state": run.state if run.ended else f"{run.state}, {run.progress:.0%}",
        "model": f"{run.model}, version {run.model_version}",
        "data set": run.dataset,
        "failures": f"{run.counts.failures} in {run.counts.decodes} perturbations of {run.counts.sources} images",
        "regions": run.region_count,
        "note": run.note,
        "error": run.error,
    }
    return _table(f"run {run.id}", facts)


def of_region(region: Region) -> str:
    """Return a region: its confusion, how bad it is, and what was said of it."""
    inside = region.real_error_rate
    facts = {
        "true label": region.true_label,
        "taken for": region.predicted_label,
        "score": f"{region.score:.3f}",
        "failures": region.size,
        "error rate": region.error_rate,
        "of its controls": region.control_error_rate,
        "real images inside": f"{inside.successes} of {inside.trials} wrong" if inside.trials else "",
        "stability": f"{region.stability:.2f}",
        "annotation": _annotation(region),
    }
    return _table(f"region {region.id} of run {region.run}", facts)


def of_pictures(pictures: RegionPictures) -> str:
    """Return a region with its pictures."""
    rows = {
        f"answered {pictures.region.predicted_label}": pictures.exemplars,
        f"their sources, real images labelled {pictures.region.true_label}": pictures.sources,
        "nearest training images": pictures.nearest,
        "nearest misclassified training images": pictures.nearest_misclassified,
    }
    return of_region(pictures.region) + "".join(_pictures(title, images) for title, images in rows.items())


def of_correction(correction: Correction) -> str:
    """Return a correction: what was chosen, and what it changes."""
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
    shown = _table(title, facts) + _rows(("region", "label", "before", "after"), changes)
    return shown + (of_verdict(correction.verdict) if correction.verdict else "")


def of_verdict(verdict: GateVerdict) -> str:
    """Return what the gate says, check by check."""
    facts = {
        "verdict": "passed" if verdict.passed else f"not passed: {len(verdict.failed)} of {len(verdict.checks)} checks",
        "model": f"{verdict.model}, beside version {verdict.base_version}",
        "data set": verdict.dataset,
    }
    checks = [
        ("yes" if check.passed else "no", check.kind, check.subject, check, f"{check.bound:.4g}", check.rule)
        for check in verdict.checks
    ]
    return _table(f"gate {verdict.id}", facts) + _rows(("holds", "check", "of", "figure", "bound", "rule"), checks)


def _annotation(region: Region) -> str:
    if not region.annotation:
        return f"open; suggested: {region.suggested_label}" if region.suggested_label else "open"
    said = region.annotation
    return f"{said.label or said.verdict}, says {said.annotator}"


def _table(title: str, facts: Mapping[str, Any]) -> str:
    """Return facts below a title; what is empty is left out."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
        if value != ""
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _rows(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return rows below their head; nothing where there are none."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{titles}</tr>{body}</table>" if body else ""


def _pictures(title: str, images: Images) -> str:
    shown = "".join(
        f'<img src="{data_uri(pixels)}" alt="" height="{_SIDE}" style="image-rendering: pixelated; margin: 2px">'
        for pixels in images[:_PICTURES]
    )
    return f"<p>{escape(title)}</p><div>{shown}</div>" if shown else ""
