"""A planted world: an image is its latent, and the classifier's boundary is the plane x0 = 0.

Sources of label 0 lie at x0 > 0; a step that crosses to x0 < 0 is taken for label 1, with margin 2 * x0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.generator.codec import as_array
from services.generator.perturbations import NoiseModel, RoundAllocation, Screening, Sources
from services.generator.pipeline import DecoderPool
from services.generator.search import SearchChecks, SearchModels, ShardResult, search
from services.generator.validity import ValidityCheck

Array = npt.NDArray[Any]
T = TypeVar("T", Sources, RoundAllocation)
DIM = 3
SD = np.array([1.0, 0.5, 2.0], np.float32)
NOISE_MODEL = NoiseModel(seed=5, radius_sd=0.8, max_failures_per_source=1000, batch_size=32)
DECODERS = DecoderPool(2)
CPU = torch.device("cpu")
# What is drawn for each source unless a test says otherwise.
DECODES = 12


@dataclass(frozen=True)
class Answered:
    """Logits that have arrived."""

    logits: Array

    def result(self) -> Array:
        return self.logits


def decode(z: Array | Tensor) -> Array:
    return as_array(z).reshape(len(z), 1, 1, DIM).astype(np.float32)


def encode(images: Array) -> tuple[Array, Array]:
    return images.reshape(len(images), DIM), np.zeros((len(images), DIM), np.float32)


def planes(images: Array) -> Array:
    """Answer the logits of a classifier whose boundary is x0 = 0."""
    x0 = images.reshape(len(images), DIM)[:, 0]
    return np.stack([x0, -x0], axis=1)


def answering(classify: Callable[[Array], Array]) -> Callable[[Array], Answered]:
    return lambda images: Answered(classify(images))


def models(classify: Callable[[Array], Array] = planes, **others: Any) -> SearchModels:
    plain = SearchModels(
        decode=decode, encode=encode, submit=answering(classify), sd_agg=SD, decoders=DECODERS, device=CPU
    )
    return replace(plain, **others)


def checks(
    *latent: ValidityCheck, screening: Screening | None = None, max_round_trip_sd: float = np.inf
) -> SearchChecks:
    return SearchChecks(
        latent=latent,
        image_label_probability=None,
        min_label_probability=0.5,
        screening=screening,
        max_round_trip_sd=max_round_trip_sd,
    )


def check(field: str, passes: Callable[[Array], Array]) -> ValidityCheck:
    """Return a check of latents by a rule on them (n, d); it records 1 where they pass, 0.25 where not."""
    return ValidityCheck(
        field=field, measure=lambda c: np.where(passes(c.latent), 1.0, 0.25), passes=lambda v: v >= 0.5
    )


def planted_sources(count: int = 20) -> Sources:
    """Plant sources at x0 from 0.2 to 1.2, with positions in the split that have gaps."""
    mu = np.random.default_rng(1).standard_normal((count, DIM)).astype(np.float32)
    mu[:, 0] = np.linspace(0.2, 1.2, count)
    return Sources(
        index=np.arange(count) * 3 + 7,
        labels=np.zeros(count, np.int64),
        mu=mu,
        held_out=np.arange(count) % 3 == 0,
        images=np.zeros((3 * count + 7, 1, DIM, 1), np.uint8),
    )


def row_of(source: Array) -> Array:
    """Return the row of planted sources, given their positions in the split."""
    return (source - 7) // 3


def round_allocation(sources: Sources, decodes: int | Array = DECODES, **others: Any) -> RoundAllocation:
    """Order the same number of decodes of each source, or so many of each, in round 0, all draws alike."""
    count = len(sources.index)
    plain = RoundAllocation(
        round_=0,
        decodes=np.broadcast_to(decodes, count).copy(),
        found=np.zeros(count, np.int32),
        reconstruction_margin=2.0 * sources.mu[:, 0],
    )
    return replace(plain, **others)


def cut(whole: T, rows: slice) -> T:
    """Return what a shard has of all sources, or of the orders for them."""
    shared = {"round_", "directions", "screen", "images"}
    return replace(whole, **{f.name: getattr(whole, f.name)[rows] for f in fields(whole) if f.name not in shared})


def searched(
    sources: Sources | None = None,
    wanted: RoundAllocation | None = None,
    noise_model: NoiseModel = NOISE_MODEL,
    asked: SearchModels | None = None,
    checked: SearchChecks | None = None,
) -> ShardResult:
    """Search planted sources, all of them where nothing else is said."""
    sources = planted_sources() if sources is None else sources
    return search(
        sources, wanted or round_allocation(sources), noise_model, asked or models(), checked or checks(), classes=2
    )


def joined(results: Sequence[ShardResult]) -> dict[str, Array]:
    """Return the failures and the tallies of shards one after the other, their counts and directions added up."""
    parts = [_arrays(result) for result in results]
    summed = ("counts.", "directions.")
    return {
        name: np.sum([part[name] for part in parts], axis=0)
        if name.startswith(summed)
        else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }


def _arrays(result: ShardResult) -> dict[str, Array]:
    arrays = {name: getattr(result, name) for name in ("decodes", "margin_sum", "margin_square_sum")}
    arrays |= {f"failures.{name}": array for name, array in result.failures.arrays().items()}
    arrays |= {f"counts.{name}": np.asarray(value) for name, value in vars(result.counts).items()}
    return arrays | {f"directions.{name}": array for name, array in result.directions.arrays().items()}
