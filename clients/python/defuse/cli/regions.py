"""`defuse regions` and `defuse annotate`: regions of a run, and their annotations."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import JsonOption, RunArgument, console, print_json, print_table, to_record
from defuse.client import Client
from defuse.errors import InvalidInput
from defuse.pictures import contact_sheet
from defuse.report import to_json
from defuse.values import Estimate, Region

app = typer.Typer(help="Misclassification regions of a run.", no_args_is_help=True)
RegionArgument = Annotated[str, typer.Argument(metavar="REGION", help="Id of the region, for instance r1.")]


@app.command(name="list")
def list_(run: RunArgument, as_json: JsonOption = False) -> None:
    """List the regions of a run, largest score first."""
    with Client() as client:
        regions = client.regions(run)
    _print_regions(regions, as_json=as_json)


@app.command()
def show(
    run: RunArgument,
    region: RegionArgument,
    out: Annotated[Path | None, typer.Option(help="Contact sheet to write; by default RUN-REGION.png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a region, and write a contact sheet of its images."""
    with Client() as client:
        pictures = client.region(run, region)
    sheet = out or Path(f"{run}-{region}.png")
    contact_sheet(pictures).save(sheet)
    if as_json:
        print_json({**to_record(pictures.region), "contact_sheet": str(sheet)})
    else:
        _print_regions([pictures.region], as_json=False)
        console.print(f"suggested: {pictures.region.suggested_label} ({pictures.region.suggestion_reason})")
        console.print(f"contact sheet: {sheet.resolve()}", soft_wrap=True)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="Id of the first run.")],
    after: Annotated[str, typer.Argument(metavar="RUN_B", help="Id of the second run.")],
    as_json: JsonOption = False,
) -> None:
    """Compare the regions of two runs: new, gone, moved, same."""
    with Client() as client:
        found = client.diff_regions(before, after)
    if as_json:
        print_json(to_json(found))
        return
    rows = [
        *[("new", "", *_summary(region), "") for region in found.added],
        *[("gone", *_summary(region)[:1], "", *_summary(region)[1:], "") for region in found.gone],
        *[
            ("moved" if pair.moved else "same", pair.before.id, *_summary(pair.after), f"{pair.shift_sd:.2f}")
            for pair in found.kept
        ],
    ]
    columns = ("", before, after, "true", "predicted", "failures", "error rate", "shift")
    caption = "new, then gone, by score; then regions of both runs by shift, in standard deviations of the regions"
    print_table(columns, rows, caption=caption)


def _summary(region: Region) -> tuple[object, ...]:
    return region.id, region.true_label, region.predicted_label, region.size, region.error_rate


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="File to write; by default RUN.safetensors.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the regions of a run to a safetensors file, for programs.

    The file contains Gaussians, failures, images and records.
    """
    with Client() as client:
        file = client.export_regions(run, out or Path(f"{run}.safetensors"))
    if as_json:
        print_json({"file": str(file)})
    else:
        console.print(f"regions: {file.resolve()}", soft_wrap=True)


def annotate(
    run: RunArgument,
    region: Annotated[str | None, typer.Argument(metavar="REGION", help="Id of the region, for instance r1.")] = None,
    label: Annotated[str | None, typer.Option(help="Class of every image of the region.")] = None,
    verdict: Annotated[str | None, typer.Option(help="invalid, mixed or unsure, instead of a label.")] = None,
    suggested: Annotated[bool, typer.Option("--suggested", help="Accept the suggested labels.")] = False,
    annotator: Annotated[str | None, typer.Option(help="Name of the annotator; by default the user's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Annotate a region with a label or another verdict.

    With --suggested and no region, every region without a verdict gets its suggested label. A mixed region is split;
    its parts are printed as well, and can be annotated like any region.
    """
    if sum(bool(choice) for choice in (label, verdict, suggested)) != 1:
        raise InvalidInput("give one of --label, --verdict and --suggested")
    if region is None and not suggested:
        raise InvalidInput("give the id of a region, or accept every suggestion with --suggested")
    with Client() as client:
        if suggested:
            regions = _to_label(client, run, region)
            annotated = [client.annotate(run, r.id, label=r.suggested_label, annotator=annotator) for r in regions]
        else:
            annotated = [
                client.annotate(run, str(region), label=label or "", verdict=verdict or "label", annotator=annotator)
            ]
            if verdict == "mixed":
                annotated += [part for part in client.regions(run) if part.parent_region == region]
    _print_regions(annotated, as_json=as_json)


def _to_label(client: Client, run: str, region: str | None) -> list[Region]:
    """Return the given region, or all regions without an annotation."""
    if region is not None:
        return [client.region(run, region).region]
    return [found for found in client.regions(run) if found.annotation is None]


def _print_regions(regions: list[Region], *, as_json: bool) -> None:
    if as_json:
        print_json([{**to_record(region), "region": region.id} for region in regions])
        return
    rows = [
        (
            region.id,
            f"{region.score:.3f}",
            region.true_label,
            region.predicted_label,
            f"{region.size} of {region.source_count} images",
            region.error_rate,
            f"{region.control_error_rate.value:.3f}",
            _ratio(region.real_error_rate),
            f"{region.stability:.2f}",
            region.annotation.label if region.annotation and region.annotation.label else region.suggested_label,
            region.state,
        )
        for region in regions
    ]
    columns = (
        "region",
        "score",
        "true",
        "predicted",
        "failures",
        "error rate",
        "control",
        "real images wrong",
        "stability",
        "label or suggestion",
        "state",
    )
    caption = "largest score first; score, 0 to 1: error rate above control x share of the sources with failures"
    print_table(columns, rows, caption=caption)


def _ratio(estimate: Estimate) -> str:
    return f"{estimate.successes} of {estimate.trials}"
