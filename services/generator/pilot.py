"""The pilot: both renderings on a few sources, which decide how a run renders.

The decoder's images are searched as published when they lose few real images to reconstruction, and their failures are
as often valid as those of changed source images. Photographs fail the first condition, digits meet both
(docs/explanation/method.md, "Rendering").
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from defuse.v1 import run_pb2

from services.arrays import Array
from services.generator import noise
from services.generator.allocation import uniform_allocation
from services.generator.failures import SearchCounters
from services.generator.perturbations import RoundAllocation, Sources
from services.generator.preflight import measure_margins
from services.generator.run_context import RunContext, noise_model_of, real_images
from services.generator.search import search
from services.statistics.hypothesis_tests import ErrorRateTest
from services.storage import keys
from services.storage.catalog import LabelledImages, estimate, settle

SOURCES = 200
# Perturbations of each source, in each rendering.
_DRAWS = 8
_SIGNIFICANCE = 0.05
# Separates the choice of sources from others of the same seed.
_STREAM = 0x50494C4F54

Search, Validity = run_pb2.SearchConfig, run_pb2.ValidityConfig


@dataclass(frozen=True, kw_only=True)
class _Pilot:
    """The sources of a pilot, and what both renderings share."""

    context: RunContext
    run: run_pb2.Run
    sources: Sources
    sd_agg: Array
    check: Callable[[], None]

    def margins(self, rendering: run_pb2.SearchConfig.Rendering.ValueType) -> Array:
        """Return the margins (n,) of the unperturbed images of a rendering."""
        run = _judged_on_images(self.run, rendering)
        read = measure_margins(
            np.array(self.sources.images[self.sources.index]),
            self.sources.labels,
            self.sources.mu,
            self.context.models(run, self.sd_agg),
            batch_size=run.config.search.batch_size,
            check=self.check,
        )
        return np.where(read.searchable, read.reconstruction_margin, -1.0)

    def searched(self, rendering: run_pb2.SearchConfig.Rendering.ValueType, margin: Array) -> SearchCounters:
        """Search around the sources with a positive margin (n,), and return the counts."""
        run = _judged_on_images(self.run, rendering)
        allocation = RoundAllocation(
            round_=0,
            decodes=uniform_allocation(margin > 0, _DRAWS),
            found=np.zeros(len(margin), np.int32),
            reconstruction_margin=margin,
        )
        return search(
            self.sources,
            allocation,
            replace(noise_model_of(run), max_failures_per_source=_DRAWS),
            self.context.models(run, self.sd_agg),
            self.context.checks(run),
            classes=len(self.context.model(run).classes),
            check=self.check,
        ).counts


def run_pilot(
    context: RunContext, run: run_pb2.Run, index: Array, sd_agg: Array, check: Callable[[], None]
) -> run_pb2.Pilot:
    """Search around a few of the images at rows `index` (n,) with both renderings, and choose one.

    Both are judged by the label model on images, at the thresholds of `residual`.
    """
    searched = context.images(run, keys.SEARCHED_SPLIT)
    # Some are read wrongly, and take no part.
    rows = index[noise.choose_positions(seed=run.config.seed ^ _STREAM, count=len(index), limit=2 * SOURCES)]
    pilot = _Pilot(context=context, run=run, sources=_sources(context, run, searched, rows), sd_agg=sd_agg, check=check)
    residual = pilot.margins(Search.RENDERING_RESIDUAL)
    right = np.flatnonzero(residual > 0)[:SOURCES]
    pilot, residual = replace(pilot, sources=_sources(context, run, searched, rows[right])), residual[right]
    decoder = pilot.margins(Search.RENDERING_DECODER)
    result = run_pb2.Pilot(sources=len(right), reconstructions_lost=estimate(int((decoder <= 0).sum()), len(right)))
    _record(result.residual, pilot.searched(Search.RENDERING_RESIDUAL, residual))
    _record(result.decoder, pilot.searched(Search.RENDERING_DECODER, decoder))
    return decide(result, run.config.preflight.max_reconstruction_loss)


def decide(pilot: run_pb2.Pilot, max_reconstruction_loss: float) -> run_pb2.Pilot:
    """Write a pilot's choice into it, by the rule of `Pilot` in the contract, and return it."""
    residual, decoder = pilot.residual.valid, pilot.decoder.valid
    pilot.p_value = ErrorRateTest(
        errors=residual.successes, decodes=residual.trials, control_errors=decoder.successes, controls=decoder.trials
    ).p_value
    readable = pilot.reconstructions_lost.value <= max_reconstruction_loss
    keeps = readable and pilot.p_value >= _SIGNIFICANCE
    pilot.rendering = Search.RENDERING_DECODER if keeps else Search.RENDERING_RESIDUAL
    return pilot


def _sources(context: RunContext, run: run_pb2.Run, searched: LabelledImages, rows: Array) -> Sources:
    return Sources(
        index=rows,
        labels=searched.labels[rows],
        mu=context.codec(run.config).encode_stored(real_images(searched, rows))[0],
        held_out=np.zeros(len(rows), np.uint8),
        images=searched.images,
    )


def _judged_on_images(run: run_pb2.Run, rendering: run_pb2.SearchConfig.Rendering.ValueType) -> run_pb2.Run:
    """Return a run with a rendering, and the label model and thresholds of `residual`."""
    config = settle(run.config, Search.RENDERING_RESIDUAL)
    config.search.rendering = rendering
    return run_pb2.Run(name=run.name, config=config)


def _record(arm: run_pb2.Pilot.Arm, counts: SearchCounters) -> None:
    arm.decodes = counts.decodes
    arm.valid.CopyFrom(estimate(counts.failures, counts.candidates))
