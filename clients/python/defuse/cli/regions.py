"""`defuse regions` and `defuse annotate`: what was found, and what people say it is."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, record
from defuse.cli.runs import RunArgument
from defuse.client import Client
from defuse.errors import InvalidInput
from defuse.pictures import contact_sheet
from defuse.values import Estimate, Region

app = typer.Typer(help="Misclassification regions of a run.", no_args_is_help=True)
RegionArgument = Annotated[str, typer.Argument(metavar="REGION", help="Id of the region, for instance r1.")]


@app.command(name="list")
def list_(run: RunArgument, as_json: JsonOption = False) -> None:
    """List the regions of a run by score, the largest first: what to fix first."""
    with Client() as client:
        regions = client.regions(run)
    _print(regions, as_json=as_json)


@app.command()
def show(
    run: RunArgument,
    region: RegionArgument,
    out: Annotated[Path | None, typer.Option(help="File of the contact sheet; by default RUN-REGION.png here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a region, and write a contact sheet of its pictures."""
    with Client() as client:
        pictures = client.region(run, region)
    sheet = out or Path(f"{run}-{region}.png")
    contact_sheet(pictures).save(sheet)
    if as_json:
        print_json({**record(pictures.region), "contact_sheet": str(sheet)})
    else:
        _print([pictures.region], as_json=False)
        console.print(f"suggested: {pictures.region.suggested_label} ({pictures.region.suggestion_reason})")
        console.print(f"contact sheet: {sheet.resolve()}", soft_wrap=True)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="Id of the first run.")],
    after: Annotated[str, typer.Argument(metavar="RUN_B", help="Id of the second run.")],
    as_json: JsonOption = False,
) -> None:
    """Compare the regions of two runs: which are new in the second, which are gone, which have moved."""
    with Client() as client:
        found = client.diff_regions(before, after)
    if as_json:
        print_json(asdict(found))
        return
    rows = [
        *[("new", "", *_brief(region), "") for region in found.added],
        *[("gone", *_brief(region)[:1], "", *_brief(region)[1:], "") for region in found.gone],
        *[
            ("moved" if pair.moved else "same", pair.before.id, *_brief(pair.after), f"{pair.shift_sd:.2f}")
            for pair in found.kept
        ],
    ]
    columns = ("", before, after, "true", "predicted", "failures", "error rate", "shift")
    print_table(columns, rows, caption="new, then gone, by score; then what both have, by shift in sds of the regions")


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="File to write; by default RUN.safetensors here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the regions of a run to one safetensors file, for programs: Gaussians, failures, pictures and records."""
    with Client() as client:
        file = client.export_regions(run, out or Path(f"{run}.safetensors"))
    if as_json:
        print_json({"file": str(file)})
    else:
        console.print(f"regions: {file.resolve()}", soft_wrap=True)


def annotate(
    run: RunArgument,
    region: Annotated[str | None, typer.Argument(metavar="REGION", help="Id of the region, for instance r1.")] = None,
    label: Annotated[str | None, typer.Option(help="Class that every image of the region shows.")] = None,
    verdict: Annotated[str | None, typer.Option(help="invalid, mixed or unsure, instead of a label.")] = None,
    suggested: Annotated[bool, typer.Option("--suggested", help="Accept the suggested labels.")] = False,
    annotator: Annotated[str | None, typer.Option(help="Who says so; by default the user's name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a region shows; with --suggested and no region, accept every suggestion that has no verdict yet.

    A region that is mixed is split; its parts, which are printed too, can be annotated as any region.
    """
    if sum(bool(choice) for choice in (label, verdict, suggested)) != 1:
        raise InvalidInput("give one of --label, --verdict and --suggested")
    if region is None and not suggested:
        raise InvalidInput("name the region, or accept every suggestion with --suggested")
    with Client() as client:
        if suggested:
            wanted = _to_suggest(client, run, region)
            done = [client.annotate(run, r.id, label=r.suggested_label, annotator=annotator) for r in wanted]
        else:
            done = [
                client.annotate(run, str(region), label=label or "", verdict=verdict or "label", annotator=annotator)
            ]
            done += [part for part in client.regions(run) if part.whole == region] if verdict == "mixed" else []
    _print(done, as_json=as_json)


def _to_suggest(client: Client, run: str, region: str | None) -> list[Region]:
    if region is not None:
        return [client.region(run, region).region]
    return [found for found in client.regions(run) if found.annotation is None]


def _print(regions: list[Region], *, as_json: bool) -> None:
    if as_json:
        print_json([{**record(region), "region": region.id} for region in regions])
        return
    rows = [
        (
            region.id,
            f"{region.score:.3f}",
            region.true_label,
            region.predicted_label,
            region.size,
            region.error_rate,
            f"{region.control_error_rate.value:.3f}",
            _share(region.real_error_rate),
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
    print_table(columns, rows, caption="by score, the largest first: error rate above control x typicality, 0 to 1")


def _share(estimate: Estimate) -> str:
    return f"{estimate.successes} of {estimate.trials}"


def _brief(region: Region) -> tuple[object, ...]:
    return region.id, region.true_label, region.predicted_label, region.size, region.error_rate
