"""The search around real images for latents whose images are misclassified.

Perturbations are rendered and classified. A misclassified perturbation is a candidate. A candidate that passes every
check, and is confirmed by a second, separate call, is a failure.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from services.arrays import Array
from services.generator import pipeline
from services.generator.allocation import DirectionSums
from services.generator.codec import as_array
from services.generator.failures import Failures, SearchCounters
from services.generator.perturbations import (
    NoiseModel,
    PerturbationBatch,
    RoundAllocation,
    Screening,
    Sources,
    draw_perturbations,
    perturbations,
    rebatched,
)
from services.generator.pipeline import Pending
from services.generator.validity import ValidityCheck, radius_sd
from services.latent_space.rendering import Codes, Images, Renderer

# Logits differ by rounding between batch sizes; an answer this close to the decision is neither failure nor success.
MARGIN_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class SearchModels:
    """The functions that the search calls.

    The search itself is independent of Triton and of the networks.
    """

    # (n, d) -> (n, c, h, w) in [0, 1]
    decode: Callable[[Codes], Images]
    # (n, c, h, w) -> mu, sigma (n, d)
    encode: Callable[[Images], tuple[Array, Array]]
    # (n, c, h, w) -> pending logits (n, k)
    submit: Callable[[Images], Pending]
    # (d,) standard deviation of mu over the training split
    sd_agg: Array
    decoders: pipeline.DecoderPool
    # Device that decodes, on which perturbations are drawn and screened, too.
    device: torch.device
    # Whether images are changes of their sources (rendering `residual`).
    residual: bool = False
    # Like `submit`, of a second classifier.
    oracle: Callable[[Images], Pending] | None = None

    def renderer(self, sources: Sources) -> Renderer:
        """Return what renders perturbations of some sources."""
        return Renderer(decode=self.decode, sources=sources.source_images if self.residual else None)


@dataclass(frozen=True, kw_only=True)
class SearchChecks:
    """The checks of a failure, in the order of rejection reasons."""

    # Checks of the latent alone.
    latent: Sequence[ValidityCheck]
    # Images (n, c, h, w) and labels (n,) -> probabilities (n,) that images have their labels; None where the label
    # model reads latents.
    image_label_probability: Callable[[Images, Array], Array] | None
    min_label_probability: float
    # Tests which draws are worth decoding; None decodes all.
    screening: Screening | None
    max_round_trip_sd: float


@dataclass(frozen=True, kw_only=True)
class _Confirmation:
    """A batch of failures that was drawn and rendered again.

    It has the failures that still have their label, the pending logits, and the deviation of the re-encoded images.
    """

    part: Failures
    # Failures that no longer have their label, according to a label model on images.
    without_label: int
    answer: Pending
    oracle_answer: Pending | None
    round_trip: Array


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """The results of one shard in one round."""

    failures: Failures
    counts: SearchCounters
    # Over the sources of the shard, (n,): the fields of `SourceStatistics`.
    decodes: Array
    margin_sum: Array
    margin_square_sum: Array
    directions: DirectionSums


def search(
    sources: Sources,
    round_allocation: RoundAllocation,
    noise_model: NoiseModel,
    models: SearchModels,
    checks: SearchChecks,
    *,
    classes: int,
    check: Callable[[], None] = lambda: None,
) -> ShardResult:
    """Search one shard in one round, and return its confirmed failures.

    It renders and classifies the allocated perturbations, and keeps those that are misclassified, valid and confirmed.
    `check` is called after every batch and may raise to stop.
    """
    counts = SearchCounters(sources=len(sources.index) if round_allocation.round_ == 0 else 0)
    sums, tally = _no_directions(classes, sources.mu.shape[1]), np.zeros((3, len(sources.index)))
    found = [Failures.none(sources.mu.shape[1])]
    makers = draw_perturbations(sources, round_allocation, noise_model, models.sd_agg, checks.screening, models.device)
    parts = models.decoders.prefetch(makers)
    batches = rebatched(_counted(parts, counts), noise_model.batch_size)
    renderer = models.renderer(sources)

    def render(batch: PerturbationBatch) -> Images:
        return renderer(batch.z, sources.index[batch.row])

    for batch, logits in pipeline.classified(batches, render, models.submit, models.decoders):
        margin = margins(logits, sources.labels[batch.row])
        counts.decodes += len(batch.row)
        counts.decodes_again += len(np.unique(batch.row)) if models.residual else 0
        for sum_, value in zip(tally, (np.ones_like(margin), margin, margin**2), strict=True):
            np.add.at(sum_, batch.row, value)
        if round_allocation.screen:
            change = margin - round_allocation.reconstruction_margin[batch.row]
            sums += DirectionSums.of(sources.labels[batch.row], batch.eps, change, classes)
        found.append(_candidates(sources, round_allocation, models, batch, logits, margin))
        check()
    counts.classifications += counts.decodes
    valid = _filter_valid(Failures.joined(found), checks.latent, counts)
    confirmed = _confirm(valid, sources, noise_model, models, checks, counts, check)
    kept = _limit_per_source(confirmed, sources, round_allocation, noise_model, counts)
    return ShardResult(
        failures=kept,
        counts=counts,
        decodes=tally[0].astype(np.int32),
        margin_sum=tally[1],
        margin_square_sum=tally[2],
        directions=sums,
    )


def _counted(parts: Iterable[tuple[PerturbationBatch, int]], counts: SearchCounters) -> Iterator[PerturbationBatch]:
    for part, screened_out in parts:
        counts.screened_out += screened_out
        yield part


def margins(logits: Array, labels: Array) -> Array:
    """Return the logit of the label minus the largest other logit, (n,)."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return np.asarray(logits[rows, labels] - others.max(axis=1, initial=-np.inf))


def _candidates(
    sources: Sources,
    round_allocation: RoundAllocation,
    models: SearchModels,
    batch: PerturbationBatch,
    logits: Array,
    margin: Array,
) -> Failures:
    """Return the misclassified perturbations of one batch, with their identities."""
    wrong = np.flatnonzero(margin < -MARGIN_EPSILON)
    row, z = batch.row[wrong], batch.latent[wrong]
    return Failures.of(
        source=sources.index[row],
        round=np.full(len(row), round_allocation.round_),
        draw=batch.draw[wrong],
        true_label=sources.labels[row],
        predicted_label=logits[wrong].argmax(axis=1),
        margin=margin[wrong],
        radius_sd=radius_sd(z, sources.mu[row], models.sd_agg),
        latent=z,
        held_out=sources.held_out[row],
    )


def _filter_valid(candidates: Failures, checks: Sequence[ValidityCheck], counts: SearchCounters) -> Failures:
    """Remove, check by check, candidates that may no longer show their label."""
    counts.candidates = len(candidates.source)
    for check in checks:
        value = check.measure(candidates)
        passed = np.asarray(check.passes(value))
        counts.reject(check.field, int((~passed).sum()))
        candidates = candidates.with_signals(**{check.field: value}).take(passed)
    return candidates


def _confirm(
    valid: Failures,
    sources: Sources,
    noise_model: NoiseModel,
    models: SearchModels,
    checks: SearchChecks,
    counts: SearchCounters,
    check: Callable[[], None],
) -> Failures:
    """Return the failures that a second search of the same draws confirms.

    Each failure is reproduced from its identity, as a stored image, in separate calls.
    """
    mu = sources.mu[np.searchsorted(sources.index, valid.source)]
    parts = [slice(begin, begin + noise_model.batch_size) for begin in range(0, len(mu), noise_model.batch_size)]
    renderer = models.renderer(sources)
    makers = (
        partial(_rendered_again, valid.take(part), mu[part], noise_model, models, checks, renderer) for part in parts
    )
    kept = [Failures.none(sources.mu.shape[1])]
    for confirmation in models.decoders.prefetch(makers):
        kept.append(_filter_confirmed(confirmation, checks, counts))
        check()
    return Failures.joined(kept)


def _rendered_again(
    part: Failures, mu: Array, noise_model: NoiseModel, models: SearchModels, checks: SearchChecks, renderer: Renderer
) -> _Confirmation:
    _, z = perturbations(
        noise_model,
        models.sd_agg,
        mu=mu,
        source=part.source,
        round_=part.round[0],
        draw=part.draw,
        device=models.device,
    )
    images, count = pipeline.rounded(renderer(z, part.source)), len(part.source)
    if checks.image_label_probability:
        probability = checks.image_label_probability(images, part.true_label)
        labelled = np.flatnonzero(probability >= checks.min_label_probability)
        part = part.with_signals(label_probability=probability).take(labelled)
        images, z = images[labelled], z[labelled]
    return _Confirmation(
        part=part,
        without_label=count - len(part.source),
        answer=models.submit(images),
        oracle_answer=models.oracle(images) if models.oracle else None,
        round_trip=_round_trip(images, as_array(z), models),
    )


def _round_trip(images: Images, z: Array, models: SearchModels) -> Array:
    """Return the distance (n,) of the images' latents to the latents z (n, d) that they were rendered from."""
    return radius_sd(models.encode(images)[0], z, models.sd_agg) if len(z) else np.zeros(0)


def _filter_confirmed(confirmation: _Confirmation, checks: SearchChecks, counts: SearchCounters) -> Failures:
    """Remove, reason by reason, failures that the confirmation does not reproduce."""
    part, count, logits = confirmation.part, len(confirmation.part.source), confirmation.answer.result()
    agreed = (logits.argmax(axis=1) == part.predicted_label) & (margins(logits, part.true_label) < -MARGIN_EPSILON)
    oracle_margin = (
        margins(confirmation.oracle_answer.result(), part.true_label) if confirmation.oracle_answer else np.zeros(count)
    )
    counts.reject("label_probability", confirmation.without_label)
    counts.decodes_again += count + confirmation.without_label
    counts.encodes += count
    counts.classifications += count * (2 if confirmation.oracle_answer else 1)
    reasons = {
        "round_trip_sd": confirmation.round_trip <= checks.max_round_trip_sd,
        "oracle_margin": oracle_margin > MARGIN_EPSILON if confirmation.oracle_answer else np.ones(count, bool),
        "confirmation": agreed,
    }
    kept = np.ones(count, bool)
    for reason, passed in reasons.items():
        counts.reject(reason, int((kept & ~passed).sum()))
        kept &= passed
    return part.with_signals(round_trip_sd=confirmation.round_trip, oracle_margin=oracle_margin).take(kept)


def _limit_per_source(
    confirmed: Failures,
    sources: Sources,
    round_allocation: RoundAllocation,
    noise_model: NoiseModel,
    counts: SearchCounters,
) -> Failures:
    """Remove all but the first failures of each source.

    Failures of earlier rounds count towards the limit.
    """
    earlier = round_allocation.found[np.searchsorted(sources.index, confirmed.source)]
    kept = confirmed.take(earlier + _rank_within(confirmed.source) < noise_model.max_failures_per_source)
    counts.rejected_by_source_limit = len(confirmed.source) - len(kept.source)
    counts.failures = len(kept.source)
    return kept


def _rank_within(group: Array) -> Array:
    """Return each entry's number of predecessors in its group.

    Groups must be contiguous.
    """
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, int)
    lengths = np.diff(np.r_[starts, len(group)])
    return np.arange(len(group)) - np.repeat(starts, lengths)


def _no_directions(classes: int, dim: int) -> DirectionSums:
    return DirectionSums.of(np.zeros(0, int), np.zeros((0, dim)), np.zeros(0), classes)
