"""The options that say what a run is made with: one room for starting a run and for asking what it would cost."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run as the command line describes it."""

    model: Annotated[str, typer.Option(help="Model under test.")]
    data: Annotated[str, typer.Option(help="Class folders, an .npz, or a URL that the services can read.")]
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0
    model_version: Annotated[int, typer.Option(help="Version under test; 0 takes the one that callers get.")] = 0
    radius: Annotated[float, typer.Option(help="Step size in latent standard deviations; 0 takes the default.")] = 0.0
    draws: Annotated[int, typer.Option(help="Budget: perturbations per image, on average; 0 takes the default.")] = 0
    max_sources: Annotated[int, typer.Option(help="Images to search around; 0 takes all.")] = 0
    strategy: Annotated[str, typer.Option(help="Where to look: `adaptive` or `uniform`.")] = "adaptive"
    noise: Annotated[str, typer.Option(help="Law of the steps: `gaussian` or `released`.")] = "gaussian"
    vae_epochs: Annotated[int, typer.Option(help="Epochs of the VAE; 0 takes what fits the data.")] = 0
    encoder: Annotated[Path | None, typer.Option(help="ONNX encoder of your own; needs --decoder.")] = None
    decoder: Annotated[Path | None, typer.Option(help="ONNX decoder of your own; needs --encoder.")] = None
    min_label_probability: Annotated[
        float | None, typer.Option(help="Of the source's label, by the latent label model; default 0.998.")
    ] = None
    validity_from: Annotated[
        str, typer.Option(help="Run whose annotations advise the validity thresholds that are left out.")
    ] = ""
    oracle: Annotated[str, typer.Option(help="Model that must read the source's label in every failure.")] = ""
    declared_accuracy: Annotated[
        float | None, typer.Option(help="Refuse the run when the served model contradicts it; default 0.5.")
    ] = None
    max_reconstruction_loss: Annotated[
        float | None, typer.Option(help="Refuse the run when the VAE loses more of the images; default 0.1.")
    ] = None
    min_support: Annotated[int, typer.Option(help="Failures that make a region; 0 takes the default.")] = 0

    mixture: Annotated[
        str, typer.Option(help="`error_aware`, a region is one confusion; or `plain`, over latents alone as published.")
    ] = "error_aware"

    def settings(self) -> dict[str, Any]:
        """Return all but model and data as the client takes them."""
        return {
            "seed": self.seed,
            "model_version": self.model_version,
            "search": {
                "radius_sd": self.radius,
                "draws_per_source": self.draws,
                "max_sources": self.max_sources,
                "strategy": self.strategy,
                "noise": self.noise,
            },
            "vae": {"epochs": self.vae_epochs, "encoder": self.encoder, "decoder": self.decoder},
            "validity": {"min_label_probability": self.min_label_probability, "oracle": self.oracle},
            "validity_from": self.validity_from,
            "preflight": {
                "declared_accuracy": self.declared_accuracy,
                "max_reconstruction_loss": self.max_reconstruction_loss,
            },
            "mixture": {"min_support": self.min_support, "kind": self.mixture},
        }


def taking_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of a run before its own; it is called with a `RunOptions` first."""

    @functools.wraps(command)
    def taking(**values: Any) -> None:
        run = RunOptions(**{field.name: values.pop(field.name) for field in fields(RunOptions)})
        command(run, **values)

    _, *own = inspect.signature(command).parameters.values()
    parameters = [*inspect.signature(RunOptions).parameters.values(), *own]
    # Typer reads both.
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return taking
