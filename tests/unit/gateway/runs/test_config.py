import re
from typing import Any

import pytest
from defuse.errors import InvalidInput
from defuse.v1 import run_pb2

from services.gateway.runs.config import complete
from tests.conftest import ROOT

CONTRACT = ROOT / "protos/defuse/v1/run.proto"
SECTIONS = ("search", "validity", "preflight", "mixture", "vae")
# Settings for which 0 means 0, since they know whether they were set.
WITH_PRESENCE = [
    "validity.max_radius_sd",
    "validity.min_typicality",
    "validity.min_label_probability",
    "validity.min_neighbour_agreement",
    "validity.max_round_trip_sd",
    "preflight.declared_accuracy",
    "preflight.max_reconstruction_loss",
]


def config_with(path: str, value: Any) -> run_pb2.RunConfig:
    section, name = path.split(".")
    config = run_pb2.RunConfig()
    setattr(getattr(config, section), name, value)
    return config


def value_of(config: run_pb2.RunConfig, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def test_what_is_given_stays_beside_defaults() -> None:
    """Missing settings take their defaults; given ones stay; the argument is not changed."""
    given_ = run_pb2.RunConfig(
        seed=3,
        model="models/a",
        search=run_pb2.SearchConfig(radius_sd=1.5, strategy=run_pb2.SearchConfig.STRATEGY_UNIFORM),
        validity=run_pb2.ValidityConfig(oracle="models/b"),
        vae=run_pb2.VaeConfig(epochs=4),
    )
    before = run_pb2.RunConfig.FromString(given_.SerializeToString())
    whole, defaults = complete(given_), complete(run_pb2.RunConfig())
    assert given_ == before
    assert (whole.seed, whole.model, whole.search.radius_sd, whole.vae.epochs) == (3, "models/a", 1.5, 4)
    assert (whole.search.strategy, whole.validity.oracle) == (run_pb2.SearchConfig.STRATEGY_UNIFORM, "models/b")
    whole.search.radius_sd, whole.search.strategy = defaults.search.radius_sd, defaults.search.strategy
    whole.validity.oracle = ""
    for section in ("search", "validity", "preflight", "mixture"):
        assert getattr(whole, section) == getattr(defaults, section), section


def test_completing_twice_changes_nothing() -> None:
    """A complete configuration is complete."""
    whole = complete(run_pb2.RunConfig(seed=1))
    assert complete(whole) == whole


def test_defaults_are_those_that_the_contract_promises() -> None:
    """Each `Default 5.` in the contract is the value that is filled in, and nothing else is filled in."""
    promised = re.findall(r"Default ([\w.]*\w)[.:].*\n\s+(?:optional )?\w+ (\w+) = ", CONTRACT.read_text())
    whole = complete(run_pb2.RunConfig())
    filled = {
        field.name: field.enum_type.values_by_number[value].name if field.enum_type else float(value)
        for section in SECTIONS
        for field, value in getattr(whole, section).ListFields()
    }
    assert len(promised) > 15
    assert {name: value if value.isupper() else float(value) for value, name in promised} == filled


@pytest.mark.parametrize("path", WITH_PRESENCE)
def test_a_zero_that_was_set_stays(path: str) -> None:
    """0 is a value where the contract says so: it switches a check off or makes it strict, and is no default."""
    decoder = run_pb2.RunConfig(search={"rendering": "RENDERING_DECODER"})
    assert value_of(complete(decoder), path) > 0
    given = config_with(path, 0)
    given.search.rendering = run_pb2.SearchConfig.RENDERING_DECODER
    assert value_of(complete(given), path) == 0


@pytest.mark.parametrize(
    ("rendering", "label_model", "expected"),
    [
        ("DECODER", "AUTO", ("LATENT", 0.998, 0.01, 0.8, 1)),
        ("DECODER", "IMAGE", ("IMAGE", 0.97, 0.01, 0.8, 1)),
        ("RESIDUAL", "AUTO", ("IMAGE", 0.97, 0, 0, 1e6)),
        ("RESIDUAL", "LATENT", ("LATENT", 0.998, 0, 0, 1e6)),
    ],
)
def test_thresholds_follow_from_the_rendering(rendering: str, label_model: str, expected: tuple[object, ...]) -> None:
    """Where a caller names the rendering, label model and thresholds are filled in at once."""
    given = run_pb2.RunConfig(
        search={"rendering": f"RENDERING_{rendering}"}, validity={"label_model": f"LABEL_MODEL_{label_model}"}
    )
    validity = complete(given).validity
    assert (
        run_pb2.ValidityConfig.LabelModel.Name(validity.label_model).removeprefix("LABEL_MODEL_"),
        validity.min_label_probability,
        validity.min_typicality,
        validity.min_neighbour_agreement,
        validity.max_round_trip_sd,
    ) == expected


def test_a_pilot_leaves_thresholds_open() -> None:
    """Thresholds that depend on the rendering are absent, unless the caller set them."""
    validity = complete(run_pb2.RunConfig(validity={"min_typicality": 0.25})).validity
    assert {field.name for field, _ in validity.ListFields()} == {"max_radius_sd", "min_typicality", "label_model"}


@pytest.mark.parametrize("path", ["search.radius_sd", "search.rounds", "mixture.min_support", "search.strategy"])
def test_a_zero_without_presence_is_the_default(path: str) -> None:
    """Where nothing tells a 0 from a setting that was left out, it takes the default."""
    assert complete(config_with(path, 0)) == complete(run_pb2.RunConfig())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("search.radius_sd", 3.0),
        ("search.rounds", 2),
        ("search.rounds", 100),
        ("search.held_out_fraction", 0.999),
        ("search.max_sources", 2**62),
        ("search.batch_size", 1),
        ("validity.min_label_probability", 1.0),
        ("preflight.declared_accuracy", 1.0),
        ("mixture.min_support", 2),
        ("mixture.false_discovery_rate", 1.0),
        ("vae.latent_dim", 256),
        ("search.noise", run_pb2.SearchConfig.NOISE_RELEASED),
    ],
)
def test_the_ends_of_a_range_belong_to_it(path: str, value: float) -> None:
    """The least and the largest value that the contract names can be set."""
    assert value_of(complete(config_with(path, value)), path) == value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("search.radius_sd", 3.1),
        ("search.radius_sd", -0.5),
        ("search.draws_per_source", -1),
        ("search.max_failures_per_source", -1),
        ("search.held_out_fraction", 1.0),
        ("search.max_sources", -5),
        ("search.shard_size", -1),
        ("search.batch_size", 100_000),
        ("search.rounds", 1),
        ("search.rounds", 101),
        ("search.strategy", 3),
        ("search.noise", -1),
        ("validity.max_radius_sd", -0.1),
        ("validity.min_typicality", 1.01),
        ("validity.min_label_probability", 1.01),
        ("validity.min_neighbour_agreement", -0.1),
        ("validity.max_round_trip_sd", float("inf")),
        ("preflight.declared_accuracy", 97.0),
        ("preflight.max_reconstruction_loss", -0.1),
        ("mixture.max_components", 1001),
        ("mixture.min_support", 1),
        ("mixture.fresh_decodes", -1),
        ("vae.latent_dim", 257),
        ("vae.latent_dim", 1),
        ("vae.epochs", -1),
        ("vae.beta", float("inf")),
    ],
)
def test_values_out_of_their_bounds_are_refused_by_name(path: str, value: float) -> None:
    """A value outside its bounds is refused with its name and itself."""
    with pytest.raises(InvalidInput, match=f"{path} is {value}; it must lie between") as caught:
        complete(config_with(path, value))
    assert (caught.value.reason, caught.value.field) == ("OUT_OF_BOUNDS", f"config.{path}")


@pytest.mark.parametrize("path", [*WITH_PRESENCE, "search.radius_sd", "search.held_out_fraction", "vae.beta"])
def test_no_number_is_no_setting(path: str) -> None:
    """NaN is refused, wherever a fraction can be set."""
    with pytest.raises(InvalidInput, match=f"{path} is nan"):
        complete(config_with(path, float("nan")))
