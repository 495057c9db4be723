"""The released recipe, written anew from its description: one image, ten samples at a time, nothing in flight."""

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.stand import Array
from services.generator.codec import Codec
from services.generator.failures import Failures
from services.generator.search import MARGIN_EPSILON, SearchChecks, margins
from services.generator.validity import radius_sd
from services.triton.client import Classifier

SAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the recipe went."""

    decodes_per_s: float
    # Valid failures, at most five a source, and the seconds until the last of them.
    failures: int
    seconds: float


def search(
    pair: Codec,
    classifier: Classifier,
    sources: tuple[Array, Array],
    sd_agg: Array,
    checks: SearchChecks,
    *,
    radius_sd_: float,
    limit: int,
    failures: int,
    seconds: float,
) -> Pace:
    """Perturb one image after the other until `failures` valid ones are found, the images end, or the time is over.

    Noise is centred, and the filters are those of the search that it is compared with.
    """
    mu, labels = sources
    draw = np.random.default_rng(0)
    decodes, found, begin = 0, 0, time.perf_counter()
    for source, label in zip(mu, labels, strict=True):
        eps = draw.standard_normal((SAMPLES, len(source)))
        z = (source + radius_sd_ * sd_agg * eps).astype(np.float32)
        logits = classifier.classify(pair.decode(z))
        decodes += SAMPLES
        wrong = margins(logits, np.full(SAMPLES, label)) < -MARGIN_EPSILON
        if wrong.any():
            found += min(_valid(z[wrong], source, int(label), sd_agg, checks), limit)
        if found >= failures or time.perf_counter() - begin > seconds:
            break
    passed = time.perf_counter() - begin
    return Pace(decodes_per_s=decodes / passed, failures=found, seconds=passed)


def _valid(z: Array, source: Array, label: int, sd_agg: Array, checks: SearchChecks) -> int:
    """Count the latents that pass every check."""
    candidates = Failures.of(
        source=np.zeros(len(z)),
        true_label=np.full(len(z), label),
        radius_sd=radius_sd(z, source, sd_agg),
        latent=z,
    )
    for check in checks.latent:
        candidates = candidates.take(check.passes(check.measure(candidates)))
    return len(candidates.source)
