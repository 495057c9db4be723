"""The settings of a run as its creator gives them, and as they are sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from defuse import names
from defuse.messages import message
from defuse.steps import Steps
from defuse.uploads import content_of, upload_bytes
from defuse.v1 import run_pb2

Section = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run is made with. The sections hold what differs from the defaults, by the names of the contract.

    search: radius_sd, draws_per_source, strategy ("adaptive" or "uniform"), noise ("gaussian" or "released"), ...
    vae: latent_dim, epochs, beta, seed; or `encoder` and `decoder`, the paths of two ONNX files.
    validity: min_label_probability, min_neighbour_agreement, min_typicality, max_radius_sd, max_round_trip_sd, and
        `oracle`, the id of a second, stronger model.
    preflight: declared_accuracy, max_reconstruction_loss.
    mixture: kind ("error_aware" or "plain"), max_components, min_support, fresh_decodes, false_discovery_rate,
        bootstraps.
    validity_from: id of a run; thresholds that `validity` leaves out are those that its annotations advise.
    """

    model: str
    dataset: str
    model_version: int = 0
    seed: int = 0
    search: Section = field(default_factory=dict)
    vae: Section = field(default_factory=dict)
    validity: Section = field(default_factory=dict)
    preflight: Section = field(default_factory=dict)
    mixture: Section = field(default_factory=dict)
    validity_from: str = ""


def run_config(settings: RunSettings) -> Steps[run_pb2.RunConfig]:
    """Return what is sent; upload the files that the settings name."""
    vae = dict(settings.vae)
    for part in ("encoder", "decoder"):
        if path := vae.pop(part, None):
            vae[f"{part}_digest"] = yield from upload_bytes((yield from content_of(path)))
    validity = dict(settings.validity)
    if oracle := validity.get("oracle"):
        validity["oracle"] = names.model(oracle)
    return run_pb2.RunConfig(
        model=names.model(settings.model),
        model_version=settings.model_version,
        dataset=names.dataset(settings.dataset),
        seed=settings.seed,
        search=message(run_pb2.SearchConfig, _with_enums(settings.search, "strategy", "noise")),
        vae=message(run_pb2.VaeConfig, vae),
        validity=message(run_pb2.ValidityConfig, validity),
        preflight=message(run_pb2.PreflightConfig, settings.preflight),
        mixture=message(run_pb2.MixtureConfig, _with_enums(settings.mixture, "kind")),
        validity_from=names.run(settings.validity_from) if settings.validity_from else "",
    )


def _with_enums(section: Section, *enums: str) -> dict[str, Any]:
    """Return the section with the contract's name for a word such as `uniform`."""
    words = {name: section[name] for name in enums if section.get(name)}
    return {**section, **{name: f"{name.upper()}_{word.upper()}" for name, word in words.items()}}
