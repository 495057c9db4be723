"""Which planted spots are found, where they stand, and which regions are false."""

from typing import Any

from defuse.v1 import model_pb2, region_pb2

from benchmarks.regions.distilling import Distilled
from benchmarks.regions.spots import Planted
from benchmarks.stand import Search, Stand
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.storage import keys

# Failures of a region that the oracle is asked about.
_IMAGES = 200


def scores(stand: Stand, search: Search, found: Distilled, planted: Planted) -> dict[str, Any]:
    """Score regions against the spots that were planted.

    A region is false where no spot is its confusion and the oracle, which never met the planted mistakes, reads most of
    its failures as the classifier does.
    """
    confusions = [(str(true), str(wrong)) for true, wrong in planted.spots.confusions]
    ranks = [
        [rank for rank, region in enumerate(found.regions, start=1) if _confusion(region) == spot]
        for spot in confusions
    ]
    others = [region for region in found.regions if _confusion(region) not in confusions]
    return {
        "regions": len(found.regions),
        "groups": found.counts.groups,
        "not_worse_than_control": found.counts.not_worse_than_control,
        "spots_found": sum(bool(of) for of in ranks) / len(confusions),
        "spots_ranks": ranks,
        "spots_stability": [round(region.stability, 2) for region in found.regions if _confusion(region) in confusions],
        "purity": found.purity(),
        "error_rates": [round(region.error_rate.value, 2) for region in found.regions],
        "least_decodes": min((region.error_rate.trials for region in found.regions), default=0),
        "false_regions": sum(_is_false(stand, search, region, planted.oracle) for region in others),
    }


def _confusion(region: region_pb2.Region) -> tuple[str, str]:
    return region.true_label, region.predicted_label


def _is_false(stand: Stand, search: Search, region: region_pb2.Region, oracle: model_pb2.Model) -> bool:
    arrays = stand.store.read_arrays(keys.region_arrays(region.name))
    failures = Perturbations(latent=arrays["latent"][:_IMAGES], source=arrays["source"][:_IMAGES])
    images = RunImages(stand.store, search.run).render(failures)
    truths = stand.inference.classifier(oracle, version=1).classify(images).argmax(axis=1)
    classes = list(oracle.classes)
    return bool((truths == classes.index(region.predicted_label)).mean() > 0.5)
