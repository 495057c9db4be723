"""The configuration of a run: defaults, bounds, and advised validity thresholds."""

import asyncio
import math

from defuse import names
from defuse.errors import InvalidInput, NotReady
from defuse.v1 import generator_service_pb2, generator_service_pb2_grpc, run_pb2

from services.gateway.regions.regions import Regions
from services.runtime.tls import ServiceClient
from services.storage.catalog import is_open, settle

_SEARCH_DEFAULTS = run_pb2.SearchConfig(
    radius_sd=0.5,
    draws_per_source=50,
    max_failures_per_source=5,
    held_out_fraction=0.3,
    shard_size=4096,
    batch_size=256,
    strategy=run_pb2.SearchConfig.STRATEGY_ADAPTIVE,
    noise=run_pb2.SearchConfig.NOISE_GAUSSIAN,
    rounds=8,
    rendering=run_pb2.SearchConfig.RENDERING_AUTO,
)
# The other thresholds depend on the rendering (services.storage.catalog).
_VALIDITY_DEFAULTS = run_pb2.ValidityConfig(max_radius_sd=1.0, label_model=run_pb2.ValidityConfig.LABEL_MODEL_AUTO)
_ANY_RADIUS_SD = 1e9
_PREFLIGHT_DEFAULTS = run_pb2.PreflightConfig(declared_accuracy=0.5, max_reconstruction_loss=0.1)
_VAE_DEFAULTS = run_pb2.VaeConfig(max_side=64)
_MIXTURE_DEFAULTS = run_pb2.MixtureConfig(
    kind=run_pb2.MixtureConfig.KIND_ERROR_AWARE,
    max_components=100,
    min_support=5,
    fresh_decodes=200,
    false_discovery_rate=0.05,
    bootstraps=10,
)
# Least and largest value of each setting; 0 takes the default unless the setting has presence.
_BOUNDS = {
    "search.radius_sd": (1e-6, 3.0),
    "search.draws_per_source": (1, 10_000),
    "search.max_failures_per_source": (1, 1_000),
    "search.held_out_fraction": (1e-9, 1 - 1e-9),
    "search.max_sources": (1, 2**62),
    "search.shard_size": (1, 1_000_000),
    "search.batch_size": (1, 65_536),
    "search.rounds": (2, 100),
    "search.strategy": (run_pb2.SearchConfig.STRATEGY_ADAPTIVE, run_pb2.SearchConfig.STRATEGY_UNIFORM),
    "search.noise": (run_pb2.SearchConfig.NOISE_GAUSSIAN, run_pb2.SearchConfig.NOISE_RELEASED),
    "search.rendering": (run_pb2.SearchConfig.RENDERING_AUTO, run_pb2.SearchConfig.RENDERING_RESIDUAL),
    "validity.label_model": (
        run_pb2.ValidityConfig.LABEL_MODEL_AUTO,
        run_pb2.ValidityConfig.LABEL_MODEL_IMAGE,
    ),
    "validity.max_radius_sd": (0, 1e9),
    "validity.min_typicality": (0, 1),
    "validity.min_label_probability": (0, 1),
    "validity.min_neighbour_agreement": (0, 1),
    "validity.max_round_trip_sd": (0, 1e6),
    "preflight.declared_accuracy": (0, 1),
    "preflight.max_reconstruction_loss": (0, 1),
    "mixture.max_components": (1, 1000),
    "mixture.min_support": (2, 1_000_000),
    "mixture.fresh_decodes": (1, 100_000),
    "mixture.kind": (run_pb2.MixtureConfig.KIND_ERROR_AWARE, run_pb2.MixtureConfig.KIND_PLAIN),
    "mixture.false_discovery_rate": (1e-9, 1),
    "mixture.bootstraps": (1, 1000),
    "vae.latent_dim": (2, 256),
    "vae.epochs": (1, 10_000),
    "vae.beta": (1e-6, 1e3),
    "vae.max_side": (8, 128),
}


def complete(config: run_pb2.RunConfig) -> run_pb2.RunConfig:
    """Return a configuration with defaults filled in.

    Thresholds that depend on the rendering stay absent when a pilot is to choose it. Raises InvalidInput for a value
    out of bounds.
    """
    for path, (least, largest) in _BOUNDS.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        if (value and not least <= value <= largest) or math.isnan(value):
            raise InvalidInput(
                f"{path} is {value}; it must lie between {least} and {largest}",
                reason="OUT_OF_BOUNDS",
                field=f"config.{path}",
            )
    whole = run_pb2.RunConfig(
        search=_SEARCH_DEFAULTS,
        vae=_VAE_DEFAULTS,
        mixture=_MIXTURE_DEFAULTS,
        validity=_VALIDITY_DEFAULTS,
        preflight=_PREFLIGHT_DEFAULTS,
    )
    if config.search.noise == run_pb2.SearchConfig.NOISE_RELEASED:
        whole.validity.max_radius_sd = _ANY_RADIUS_SD  # released noise is not in units of the latents' spread
    whole.MergeFrom(config)
    return whole if is_open(whole) else settle(whole, whole.search.rendering)


class ThresholdAdvisor:
    """Returns validity thresholds that the generator fits to annotations."""

    def __init__(
        self, regions: Regions, generator: "ServiceClient[generator_service_pb2_grpc.GeneratorServiceAsyncStub]"
    ) -> None:
        self._regions = regions
        self._generator = generator

    async def of(self, run: run_pb2.Run) -> run_pb2.ValidityAdvice:
        """Return thresholds fitted to the latest annotations of a run.

        Raises NotReady without at least one invalid and one valid region.
        """
        judged = await asyncio.to_thread(self._regions.judged, run)
        for named, word in ((judged.invalid, "invalid"), (judged.valid, "labelled as their sources are")):
            if not named:
                raise NotReady(
                    f"no region of run {names.last(run.name)!r} is {word}; thresholds are fitted to invalid "
                    "and labelled regions; annotate at least one of each",
                    reason="NOTHING_TO_LEARN",
                )
        wanted = generator_service_pb2.LearnValidityRequest(
            run=run.name, valid_regions=judged.valid, invalid_regions=judged.invalid
        )
        answer = await self._generator.call(lambda stub, **how: stub.LearnValidity(wanted, **how))
        advice: run_pb2.ValidityAdvice = answer.advice
        return advice


def with_advised_thresholds(
    config: run_pb2.RunConfig, advice: run_pb2.ValidityAdvice, whose: run_pb2.Run
) -> run_pb2.RunConfig:
    """Return a configuration with advised thresholds in place of missing ones.

    Rendering and label model are those of the other run, which the thresholds are about, unless the configuration names
    others: then the thresholds that depend on them keep their defaults. The radius does so when the other run used
    another noise model, because its radii have another scale.
    """
    whole = run_pb2.RunConfig()
    if _agrees(config, whose.config):
        whole.search.rendering = whose.config.search.rendering
        whole.validity.CopyFrom(advice.validity)
        whole.validity.label_model = whose.config.validity.label_model
    else:
        whole.validity.max_radius_sd = advice.validity.max_radius_sd
    if complete(config).search.noise != whose.config.search.noise:
        whole.validity.ClearField("max_radius_sd")
    whole.MergeFrom(config)
    return whole


def _agrees(config: run_pb2.RunConfig, other: run_pb2.RunConfig) -> bool:
    """Return whether a configuration leaves open rendering and label model, or names those of another run."""
    named = complete(config)
    return named.search.rendering in {run_pb2.SearchConfig.RENDERING_AUTO, other.search.rendering} and (
        named.validity.label_model in {run_pb2.ValidityConfig.LABEL_MODEL_AUTO, other.validity.label_model}
    )
