"""`defuse models`: classifiers under test."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, record
from defuse.client import Client
from defuse.errors import InvalidInput
from defuse.values import Preprocessing

app = typer.Typer(help="Classifiers under test.", no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the model, also in Triton.")],
    onnx: Annotated[Path, typer.Option(help="The classifier as an ONNX file.")],
    classes: Annotated[str, typer.Option(help="Class names in the order of the outputs: a,b,c, or @FILE, one a line.")],
    mean: Annotated[str, typer.Option(help="Mean per channel after scaling; none when the graph normalises.")] = "",
    std: Annotated[str, typer.Option(help="Standard deviation per channel after scaling.")] = "",
    value_range: Annotated[
        str, typer.Option("--range", help="What pixels 0 and 255 become before mean and std.")
    ] = "0,1",
    layout: Annotated[str, typer.Option(help="NCHW or NHWC.")] = "NCHW",
    output: Annotated[str, typer.Option(help="logits or probabilities.")] = "logits",
    as_json: JsonOption = False,
) -> None:
    """Register a classifier and serve it from Triton as version 1."""
    bounds = _numbers("--range", value_range)
    if len(bounds) != 2:
        raise InvalidInput(f"--range is {value_range!r}; give two numbers, for instance 0,1 or 0,255")
    preprocessing = Preprocessing(
        layout=layout.upper(),
        low=bounds[0],
        high=bounds[1],
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
    )
    with Client() as client:
        model = client.add_model(name, onnx, _names(classes), preprocessing, output=output)
    if as_json:
        print_json(record(model))
    else:
        shape = "x".join(str(size) for size in model.image_shape)
        console.print(
            f"{model.id} is served as version {model.champion_version}: {shape}, {len(model.classes)} classes"
        )


@app.command(name="list")
def list_(as_json: JsonOption = False) -> None:
    """List the models."""
    with Client() as client:
        models = client.models()
    if as_json:
        print_json([record(model) for model in models])
        return
    rows = [
        (model.id, model.champion_version, "x".join(str(size) for size in model.image_shape), len(model.classes))
        for model in models
    ]
    print_table(("model", "version", "images", "classes"), rows, caption="by name")


def _names(text: str) -> list[str]:
    if not text.startswith("@"):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"cannot read the class names in {text[1:]}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InvalidInput(f"{option} is {text!r}; give numbers separated by commas") from error
