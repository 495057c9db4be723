"""A classifier with labelled regions and a guard of them."""

from dataclasses import dataclass

from defuse.v1 import guard_pb2, model_pb2

from benchmarks.identify.planted import Spots
from benchmarks.labelled import Labelled, labelled
from benchmarks.stand import Data, Stand
from services.corrector.guard.builder import GuardIssuer


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
    return with_guard(stand, labelled(stand, whole, smoke=smoke))


def with_guard(stand: Stand, known: Labelled) -> Guarded:
    """Have a guard made of labelled regions."""
    guard = GuardIssuer(stand.store, stand.releases).issue(known.search.run.name)
    return Guarded(model=known.model, guard=guard, spots=known.spots)
