"""Search around real images for latents that decode to images the classifier gets wrong.

`z = mu + r * sd_agg * eps`, eps ~ N(0, I): the noise is centred and in units of the aggregate latent sd.
Every eps is a pure function of (seed, source, round, draw), so that the failures found do not depend on how the sources
are cut into shards and batches, nor on how many workers share them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

Array = npt.NDArray[Any]
# Logits differ by rounding between batch sizes; an answer this close to the decision is no failure, and no success.
MARGIN_EPSILON = 1e-3
# Batches that are decoded before the first of their answers is looked at.
_AHEAD = 3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Pending(Protocol):
    """Logits that are on their way."""

    def result(self) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class Law:
    """How far and how often to step from each source."""

    seed: int
    # Standard deviation of a step in aggregate latent standard deviations.
    radius_sd: float
    draws: int
    max_failures_per_source: int
    min_label_probability: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Real images to search around, as arrays over n sources."""

    # (n,) position in the split
    index: Array
    # (n, c, h, w) float32 in [0, 1]
    images: Array
    # (n,) class ids
    labels: Array
    # (n, d) posterior means
    mu: Array
    # (n,) bool: kept out of correction
    held_out: Array


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Decoded perturbations that the classifier gets wrong, as arrays over m failures."""

    source: Array
    round: Array
    draw: Array
    true_label: Array
    predicted_label: Array
    # Logit of the true class minus the largest other one, negative.
    margin: Array
    # norm((z - mu) / sd_agg) / sqrt(d)
    radius_sd: Array
    label_probability: Array
    # (m, d)
    latent: Array
    held_out: Array

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def take(self, keep: Array) -> "Failures":
        """Return the failures that a mask or an index selects."""
        return Failures(**{name: array[keep] for name, array in self.arrays().items()})


@dataclass(kw_only=True)
class Counts:
    """What was tried and what became of it."""

    sources: int = 0
    sources_wrong_on_image: int = 0
    sources_wrong_on_reconstruction: int = 0
    decodes: int = 0
    candidates: int = 0
    rejected_by_label_model: int = 0
    rejected_by_source_limit: int = 0
    failures: int = 0


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the search asks: functions, so that it knows neither Triton nor torch."""

    # (n, d) -> (n, c, h, w) in [0, 1]
    decode: Callable[[Array], Array]
    # (n, c, h, w) -> logits (n, k), later
    submit: Callable[[Array], Pending]
    # (n, d), (n,) class ids -> (n,) probability of that class according to the data
    label_probability: Callable[[Array, Array], Array]
    # (d,) standard deviation of mu over the training split
    sd_agg: Array


def search(
    sources: Sources, law: Law, models: Models, *, round_: int = 0, on_batch: Callable[[float], None] = lambda _: None
) -> tuple[Failures, Counts]:
    """Search around every source that the classifier gets right, as an image and as a reconstruction.

    `on_batch` is told the share done after each batch and may raise to stop the search.
    """
    counts = Counts(sources=len(sources.index))
    searched = _searchable(sources, models, law.batch_size, counts)
    found = []
    for z, row, draw, logits in _answers(sources, searched, law, models, round_, on_batch):
        margin = margins(logits, sources.labels[row])
        wrong = margin < -MARGIN_EPSILON
        counts.decodes += len(z)
        found.append(
            _failures(sources, models, z[wrong], row[wrong], draw[wrong], logits[wrong], margin[wrong], round_)
        )
    return _keep(_concatenate(found, latent_dim=sources.mu.shape[1]), law, counts), counts


def perturb(mu: Array, sd_agg: Array, eps: Array, radius_sd: float) -> Array:
    """Return `mu + r * sd_agg * eps` for mu (n, d), sd_agg (d,), eps (n, d)."""
    return (mu + radius_sd * sd_agg * eps).astype(np.float32)


def noise(*, seed: int, source: Array, round_: int, draw: Array, dim: int) -> Array:
    """Return standard normal noise (n, dim), a pure function of (seed, source, round, draw) per row.

    Counter-based: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over the identity, through the normal quantile.
    """
    key = _uniform_bits(seed, source, np.full(len(source), round_), draw)  # (n,)
    bits = _mix(key[:, None] + _GOLDEN * np.arange(1, dim + 1, dtype=np.uint64))  # (n, dim)
    return np.asarray(ndtri(_unit(bits)))


def is_held_out(*, seed: int, source: Array, fraction: float) -> Array:
    """Say for each source (n,) whether correction must not see it; a fixed share, drawn by seed and source alone."""
    return np.asarray(_unit(_uniform_bits(seed ^ 0x48454C44, source)) < fraction)


def choose_sources(*, seed: int, count: int, limit: int) -> Array:
    """Return the positions of at most `limit` of `count` sources, ascending, drawn by seed; all of them for limit 0."""
    positions = np.arange(count, dtype=np.int64)
    if not 0 < limit < count:
        return positions
    order = np.argsort(_uniform_bits(seed ^ 0x534F5552, positions), kind="stable")
    return np.sort(order[:limit])


def margins(logits: Array, labels: Array) -> Array:
    """Return the logit of the label minus the largest other logit, (n,)."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return np.asarray(logits[rows, labels] - others.max(axis=1, initial=-np.inf))


def _searchable(sources: Sources, models: Models, batch_size: int, counts: Counts) -> Array:
    """Return the rows of the sources that are right as image and as reconstruction, with a margin beyond rounding."""
    on_image, on_reconstruction = [], []
    for begin in range(0, len(sources.index), batch_size):
        batch = slice(begin, begin + batch_size)
        answers = models.submit(sources.images[batch]), models.submit(models.decode(sources.mu[batch]))
        labels = sources.labels[batch]
        on_image.append(margins(answers[0].result(), labels) > MARGIN_EPSILON)
        on_reconstruction.append(margins(answers[1].result(), labels) > MARGIN_EPSILON)
    image_right = np.concatenate([*on_image, np.zeros(0, bool)])
    both_right = image_right & np.concatenate([*on_reconstruction, np.zeros(0, bool)])
    counts.sources_wrong_on_image = int((~image_right).sum())
    counts.sources_wrong_on_reconstruction = int((image_right & ~both_right).sum())
    return np.flatnonzero(both_right)


def _answers(
    sources: Sources, searched: Array, law: Law, models: Models, round_: int, on_batch: Callable[[float], None]
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Yield (z, row of the source, draw, logits) in batches; decoding runs ahead of the classifier's answers."""
    total = len(searched) * law.draws
    waiting: deque[tuple[Array, Array, Array, Pending]] = deque()
    for begin in range(0, total, law.batch_size):
        flat = np.arange(begin, min(begin + law.batch_size, total))
        row, draw = searched[flat // law.draws], flat % law.draws
        eps = noise(seed=law.seed, source=sources.index[row], round_=round_, draw=draw, dim=sources.mu.shape[1])
        z = perturb(sources.mu[row], models.sd_agg, eps, law.radius_sd)
        waiting.append((z, row, draw, models.submit(models.decode(z))))
        on_batch(begin / total)
        if len(waiting) > _AHEAD:
            yield _arrived(waiting.popleft())
    while waiting:
        yield _arrived(waiting.popleft())


def _arrived(batch: tuple[Array, Array, Array, Pending]) -> tuple[Array, Array, Array, Array]:
    z, row, draw, pending = batch
    return z, row, draw, pending.result()


def _failures(
    sources: Sources, models: Models, z: Array, row: Array, draw: Array, logits: Array, margin: Array, round_: int
) -> Failures:
    labels = sources.labels[row]
    # A latent dimension that the VAE does not use has no scale, and no step was made along it.
    scale = np.where(models.sd_agg > 0, models.sd_agg, 1)
    step = (z - sources.mu[row]) / scale  # (m, d)
    return Failures(
        source=sources.index[row].astype(np.int64),
        round=np.full(len(row), round_, np.int32),
        draw=draw.astype(np.int32),
        true_label=labels.astype(np.int32),
        predicted_label=logits.argmax(axis=1).astype(np.int32),
        margin=margin.astype(np.float32),
        radius_sd=(np.linalg.norm(step, axis=1) / np.sqrt(z.shape[1])).astype(np.float32),
        label_probability=models.label_probability(z, labels).astype(np.float32),
        latent=z,
        held_out=sources.held_out[row].astype(np.uint8),
    )


def _keep(candidates: Failures, law: Law, counts: Counts) -> Failures:
    """Leave out what is no longer its label, then all but the first failures of each source."""
    counts.candidates = len(candidates.source)
    valid = candidates.take(candidates.label_probability >= law.min_label_probability)
    kept = valid.take(_rank_within(valid.source) < law.max_failures_per_source)
    counts.rejected_by_label_model = counts.candidates - len(valid.source)
    counts.rejected_by_source_limit = len(valid.source) - len(kept.source)
    counts.failures = len(kept.source)
    return kept


def _rank_within(group: Array) -> Array:
    """Return for each entry how many entries of the same group come before it; groups are contiguous."""
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, int)
    lengths = np.diff(np.r_[starts, len(group)])
    return np.arange(len(group)) - np.repeat(starts, lengths)


def _concatenate(parts: list[Failures], *, latent_dim: int) -> Failures:
    parts = [*parts, nothing(latent_dim)]
    names = [field.name for field in fields(Failures)]
    return Failures(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def nothing(latent_dim: int) -> Failures:
    """Return no failures, with the types of the arrays."""
    ints, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Failures(
        source=np.zeros(0, np.int64),
        round=ints,
        draw=ints,
        true_label=ints,
        predicted_label=ints,
        margin=floats,
        radius_sd=floats,
        label_probability=floats,
        latent=np.zeros((0, latent_dim), np.float32),
        held_out=np.zeros(0, np.uint8),
    )


def _uniform_bits(seed: int, *parts: Array) -> Array:
    """Hash a seed and arrays of integers (n,) to 64 uniform bits each, (n,)."""
    state = _mix(np.full(len(parts[0]), seed, np.uint64) + _GOLDEN)
    for part in parts:
        state = _mix((state ^ part.astype(np.uint64)) + _GOLDEN)
    return state


def _mix(bits: Array) -> Array:
    """Finalise SplitMix64; multiplication wraps around, as it should."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))


def _unit(bits: Array) -> Array:
    """Map 64 bits to the open interval (0, 1)."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
