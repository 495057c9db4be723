"""The difference between two runs' regions: new, gone and moved ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import region_pb2, run_pb2
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2

from services.arrays import Array
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.statistics.gaussian import Gaussian
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

# Regions of one confusion with a larger distance of their means, in sds of the regions, differ, unless chance alone
# explains the distance.
_LARGEST_SHIFT_SD = 3.0
# Overlap (Bhattacharyya) at which a region of one run counts as part of a region of the other.
_PART = 0.3
_CONFIDENCE = 0.99


@dataclass(frozen=True, kw_only=True)
class RegionPlace:
    """A region's Gaussian, its confusion by name, and its number of sources."""

    confusion: tuple[str, str]
    gaussian: Gaussian
    sources: int


@dataclass(frozen=True, kw_only=True)
class MatchedRegions:
    """The positions of a region before and after, and its shift.

    `moved` is whether the shift exceeds chance.
    """

    before: int
    after: int
    shift_sd: float
    moved: bool


def match_regions(before: Sequence[RegionPlace], after: Sequence[RegionPlace]) -> list[MatchedRegions]:
    """Pair the regions of two runs that have the same confusion.

    Regions are first paired one to one, with the least sum of shifts. A remaining region that is part of a region of
    the other run is then paired with that region. Regions without a pair are new or gone. The pairs are returned by
    ascending shift. Both runs must share one latent space.
    """
    found = list(_one_to_one(before, after))
    found += _parts(before, after, {i for i, _ in found}, {j for _, j in found})
    pairs = [_matched(before, after, i, j) for i, j in found]
    return sorted(pairs, key=lambda pair: (pair.shift_sd, pair.before, pair.after))


def _one_to_one(before: Sequence[RegionPlace], after: Sequence[RegionPlace]) -> Iterator[tuple[int, int]]:
    shift = np.array([[_shift_sd(one, other) for other in after] for one in before]).reshape(len(before), len(after))
    limit = np.array([[_limit_sd(one, other) for other in after] for one in before]).reshape(shift.shape)
    # An invalid match costs more than all valid ones together.
    cost = np.where(shift <= limit, shift, 1e3 * (1 + len(before) + len(after)))
    for i, j in zip(*linear_sum_assignment(cost), strict=True):
        if shift[i, j] <= limit[i, j]:
            yield int(i), int(j)


def _parts(
    before: Sequence[RegionPlace], after: Sequence[RegionPlace], paired: set[int], paired_after: set[int]
) -> Iterator[tuple[int, int]]:
    """Yield the remaining regions that are part of another run's region.

    Each comes as a pair with that region.
    """
    overlap = np.array([[_overlap(one, other) for other in after] for one in before]).reshape(len(before), len(after))
    if not overlap.size:
        return
    lone = [(i, int(overlap[i].argmax())) for i in range(len(before)) if i not in paired]
    lone += [(int(overlap[:, j].argmax()), j) for j in range(len(after)) if j not in paired_after]
    yield from ((i, j) for i, j in lone if overlap[i, j] >= _PART)


def _matched(before: Sequence[RegionPlace], after: Sequence[RegionPlace], i: int, j: int) -> MatchedRegions:
    shift = _shift_sd(before[i], after[j])
    return MatchedRegions(before=i, after=j, shift_sd=shift, moved=shift > _chance_sd(before[i], after[j]))


def _shift_sd(one: RegionPlace, other: RegionPlace) -> float:
    return one.gaussian.shift_sd(other.gaussian) if one.confusion == other.confusion else np.inf


def _overlap(one: RegionPlace, other: RegionPlace) -> float:
    return one.gaussian.overlap(other.gaussian) if one.confusion == other.confusion else 0.0


def _limit_sd(one: RegionPlace, other: RegionPlace) -> float:
    return max(_LARGEST_SHIFT_SD, _chance_sd(one, other))


def _chance_sd(one: RegionPlace, other: RegionPlace) -> float:
    """Return the distance of means that chance explains.

    It is the 99 % quantile for one region that is found twice (Hotelling's test).
    """
    noise = 1 / one.sources + 1 / other.sources
    return float(np.sqrt(noise * chi2.ppf(_CONFIDENCE, len(one.gaussian.mean))))


# Failures of a region that are re-encoded in another latent space: bounds memory and time.
_MOST_CARRIED = 1_000


def diff_regions(store: ArtifactStore, before: str, after: str) -> region_pb2.RegionsDiff:
    """Compare the regions of two distilled runs: new, gone and moved ones.

    When the runs have different VAEs, the second run's failures are rendered, and encoded into the first run's latent
    space. Raises InvalidInput when their images differ in shape, or their models in classes.
    """
    first, second = (_regions(store, name) for name in (before, after))
    runs = [Catalog(store).run(name) for name in (before, after)]
    _check_comparable(store, *runs)
    here = [_gaussian(store, region) for region in first]
    there = list(_reencoded(store, second, here, *runs))
    found = match_regions(_places(store, first, here), _places(store, second, there))
    known, kept = {pair.before for pair in found}, {pair.after for pair in found}
    return region_pb2.RegionsDiff(
        added=[region for number, region in enumerate(second) if number not in kept],
        gone=[region for number, region in enumerate(first) if number not in known],
        kept=[
            region_pb2.RegionPair(
                before=first[pair.before], after=second[pair.after], shift_sd=pair.shift_sd, moved=pair.moved
            )
            for pair in found
        ],
    )


def _regions(store: ArtifactStore, run: str) -> list[region_pb2.Region]:
    return list(store.read_message(keys.distillation(run), region_pb2.Distillation).regions)


def _gaussian(store: ArtifactStore, region: region_pb2.Region) -> Gaussian:
    arrays = store.map_arrays(keys.region_arrays(region.name))
    return Gaussian(mean=np.array(arrays["mean"]), covariance=np.array(arrays["covariance"]))


def _places(store: ArtifactStore, regions: list[region_pb2.Region], gaussians: list[Gaussian]) -> list[RegionPlace]:
    return [
        RegionPlace(
            confusion=(region.true_label, region.predicted_label),
            gaussian=gaussian,
            sources=len(np.unique(store.map_arrays(keys.region_arrays(region.name))["source"])),
        )
        for region, gaussian in zip(regions, gaussians, strict=True)
    ]


def _reencoded(
    store: ArtifactStore,
    regions: list[region_pb2.Region],
    here: list[Gaussian],
    before: run_pb2.Run,
    after: run_pb2.Run,
) -> Iterator[Gaussian]:
    """Yield the second run's Gaussians in the first run's latent space."""
    shared = keys.vae(before.config, "") == keys.vae(after.config, "")
    if shared or not here:  # one latent space, or nothing to compare with
        yield from (_gaussian(store, region) for region in regions)
        return
    carry = _reencode(store, before, after)
    prior = np.mean([gaussian.covariance for gaussian in here], axis=0)
    for region in regions:
        arrays = store.map_arrays(keys.region_arrays(region.name))
        few = np.linspace(0, len(arrays["latent"]) - 1, min(len(arrays["latent"]), _MOST_CARRIED)).astype(int)
        yield Gaussian.of(carry(Perturbations(latent=arrays["latent"][few], source=arrays["source"][few])), prior)


def _reencode(store: ArtifactStore, before: run_pb2.Run, after: run_pb2.Run) -> Callable[[Perturbations], Array]:
    images, encode = RunImages(store, after), RunImages(store, before).encode
    return lambda perturbations: encode(images.render(perturbations))


def _check_comparable(store: ArtifactStore, before: run_pb2.Run, after: run_pb2.Run) -> None:
    first, second = (Catalog(store).model(run.config.model) for run in (before, after))
    for what, one, other in (
        ("images", list(first.image_shape), list(second.image_shape)),
        ("classes", list(first.classes), list(second.classes)),
    ):
        if one != other:
            raise InvalidInput(
                f"{what} of run {names.last(before.name)!r} are {one[:10]}, those of {names.last(after.name)!r} "
                f"{other[:10]}; compare runs of one kind of classifier",
                reason="NOT_COMPARABLE",
            )
