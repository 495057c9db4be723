"""A classifier with planted blind spots, searched, its regions labelled, with a guard of them."""

from dataclasses import dataclass

from defuse.v1 import annotation_pb2, guard_pb2, model_pb2

from benchmarks.correct.annotator import Annotator
from benchmarks.identify.planted import Spots, plant
from benchmarks.regions.distilling import distilled
from benchmarks.regions.spots import handed_over, independent, served
from benchmarks.stand import SMOKE, Data, Stand
from services.corrector.guard.issuing import Guards
from services.runtime import catalog

_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """The model with its guard, and the spots that only the benchmark knows."""

    model: model_pb2.Model
    guard: guard_pb2.Guard
    spots: Spots


def guarded(stand: Stand, whole: Data, *, smoke: bool) -> Guarded:
    """Search a classifier with planted spots, label what is found and have a guard made of it.

    The images of the spots are in none of the splits that it gets.
    """
    epochs = 1 if smoke else _EPOCHS
    oracle, spots = independent(stand, whole, epochs=epochs), plant(whole)
    data = handed_over(whole, spots, absent=True)
    dataset = stand.add_dataset("absent", data)
    model = served(stand, whole, oracle=oracle, epochs=epochs).model
    config = stand.configure(model, dataset, search={"draws_per_source": 20}, seed=0, **(SMOKE if smoke else {}))
    stand.train_vae(data, config)
    search = stand.prepare("guard", config)
    while search.step():
        pass
    regions = distilled(stand, search, kind="error_aware").regions
    # The pictures of a short run show hardly anything.
    annotator = Annotator(stand=stand, oracle=oracle, agreeing=0.0 if smoke else 0.8)
    for region in annotator.label(regions):
        verdict = annotation_pb2.Annotation(region=region.region, verdict="VERDICT_LABEL", label=region.label)
        stand.store.write_message(f"{catalog.annotations(region.region)}/1.pb", verdict)
    guard = Guards(stand.store, stand.releases).issue(search.run.name)
    return Guarded(model=model, guard=guard, spots=spots)
