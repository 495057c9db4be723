"""A searched classifier with planted blind spots and labelled regions, for corrections and guards."""

from collections.abc import Sequence
from dataclasses import dataclass

from defuse.v1 import annotation_pb2, correction_pb2, model_pb2, region_pb2

from benchmarks.correct.annotator import Annotator
from benchmarks.identify.planted import Spots, plant
from benchmarks.regions.distilling import distilled
from benchmarks.regions.spots import handed_over, independent, served
from benchmarks.stand import SMOKE, Data, Search, Stand
from services.storage import keys

_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The model, the data that it is judged by, and what was found and said of it."""

    model: model_pb2.Model
    # Without the images of the spots, which only the benchmark knows.
    data: Data
    dataset: str
    spots: Spots
    search: Search
    regions: Sequence[region_pb2.Region]
    labels: Sequence[correction_pb2.LabelledRegion]


def labelled(stand: Stand, whole: Data, *, smoke: bool) -> Labelled:
    """Plant, search, distill and annotate, as users do; once on a stand."""
    epochs = 1 if smoke else _EPOCHS
    oracle, spots = independent(stand, whole, epochs=epochs), plant(whole)
    data = handed_over(whole, spots, absent=True)
    dataset = stand.add_dataset("absent", data)
    model = served(stand, whole, oracle=oracle, epochs=epochs).model
    config = stand.configure(model, dataset, search={"draws_per_source": 20}, seed=0, **(SMOKE if smoke else {}))
    stand.train_vae(data, config)
    search = stand.prepare("labelled", config)
    while search.step():
        pass
    regions = distilled(stand, search, kind="error_aware").regions
    # The pictures of a short run show hardly anything.
    labels = Annotator(stand=stand, oracle=oracle, agreeing=0.0 if smoke else 0.8).label(regions)
    for region in labels:
        verdict = annotation_pb2.Annotation(region=region.region, verdict="VERDICT_LABEL", label=region.label)
        stand.store.write_message(f"{keys.annotations(region.region)}/1.pb", verdict)
    return Labelled(model=model, data=data, dataset=dataset, spots=spots, search=search, regions=regions, labels=labels)
