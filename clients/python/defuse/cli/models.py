"""`defuse models` and `defuse guards`: classifiers under test, and their guards."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import (
    JsonOption,
    ModelArgument,
    RunArgument,
    console,
    parse_numbers,
    parse_words,
    print_json,
    print_table,
    to_record,
)
from defuse.client import Client
from defuse.errors import InvalidInput
from defuse.values import Guard, Preprocessing

app = typer.Typer(help="Classifiers under test.", no_args_is_help=True)
guards_app = typer.Typer(help="Guards, which find known regions in live images.", no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Id of the model, also its name in Triton.")],
    onnx: Annotated[Path, typer.Option(help="The classifier as an ONNX file.")],
    classes: Annotated[
        str, typer.Option(help="Class names in the order of the outputs: a,b,c, or @FILE with one per line.")
    ],
    mean: Annotated[
        str, typer.Option(help="Mean per channel after scaling; omit it for a graph that normalises.")
    ] = "",
    std: Annotated[str, typer.Option(help="Standard deviation per channel after scaling.")] = "",
    value_range: Annotated[
        str, typer.Option("--range", help="Values of pixels 0 and 255 before mean and std are applied.")
    ] = "0,1",
    layout: Annotated[str, typer.Option(help="NCHW or NHWC.")] = "NCHW",
    output: Annotated[str, typer.Option(help="logits or probabilities.")] = "logits",
    as_json: JsonOption = False,
) -> None:
    """Register a classifier and serve it from Triton as version 1."""
    bounds = parse_numbers("--range", value_range)
    if len(bounds) != 2:
        raise InvalidInput(f"--range is {value_range!r}; give two numbers, for instance 0,1 or 0,255")
    preprocessing = Preprocessing(
        layout=layout.upper(),
        low=bounds[0],
        high=bounds[1],
        mean=parse_numbers("--mean", mean),
        std=parse_numbers("--std", std),
    )
    with Client() as client:
        model = client.add_model(name, onnx, _class_names(classes), preprocessing, output=output)
    if as_json:
        print_json(to_record(model))
    else:
        shape = _shape(model.image_shape)
        console.print(
            f"{model.id} is served as version {model.champion_version}: {shape}, {len(model.classes)} classes"
        )


def _class_names(text: str) -> list[str]:
    if not text.startswith("@"):
        return parse_words(text)
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"cannot read the class names in {text[1:]}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)


@app.command(name="list")
def list_(as_json: JsonOption = False) -> None:
    """List the models."""
    with Client() as client:
        models = client.models()
    if as_json:
        print_json([to_record(model) for model in models])
        return
    rows = [(model.id, model.champion_version, _shape(model.image_shape), len(model.classes)) for model in models]
    print_table(("model", "version", "images", "classes"), rows, caption="by id")


@guards_app.command(name="create")
def create_guard(
    run: RunArgument,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Share of correctly classified images that the guard may put inside a region.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Make a guard from the labelled regions of a run.

    Triton serves it. Every release makes a guard as well.
    """
    with Client() as client:
        guard = client.create_guard(run, false_alarm_rate=false_alarm_rate)
    if as_json:
        print_json(to_record(guard))
    else:
        _print_guards([guard])


@guards_app.command(name="list")
def list_guards(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the guards of a model; the last is served."""
    with Client() as client:
        guards = client.guards(name)
    if as_json:
        print_json([to_record(guard) for guard in guards])
    else:
        _print_guards(guards)


def _print_guards(guards: list[Guard]) -> None:
    rows = [
        (
            guard.id,
            guard.run,
            ", ".join(f"{region} ({label})" for region, label in guard.regions.items()),
            f"{guard.false_alarm_rate:g}",
            guard.measured_false_alarm_rate,
            guard.recall,
            guard.guarded_model,
        )
        for guard in guards
    ]
    columns = ("guard", "run", "regions (label)", "false alarm rate", "measured", "recall", "in Triton")
    print_table(columns, rows, caption="oldest first; recall of held-out failures; 95 % intervals")
