"""How often a model is right in production, as far as ground truth came."""

from collections.abc import Iterable, Sequence

from defuse.errors import NotFound
from defuse.v1 import monitor_pb2

from services.storage import keys
from services.storage.artifacts import ArtifactStore


def counts(store: ArtifactStore, batch: str, classes: Sequence[str]) -> str:
    """Return `right of` for a batch: its observations whose truth and prediction are known; nothing without any."""
    truths = _truths(store, batch)
    try:
        seen = store.read_arrays(keys.watched(batch)) if truths else {}
    except NotFound:
        return ""
    right = [
        classes[predicted] == truths[row.tobytes()]
        for row, predicted in zip(seen.get("id", ()), seen.get("predicted", ()), strict=True)
        if predicted >= 0 and row.tobytes() in truths
    ]
    return f"{sum(right)} {len(right)}" if right else ""


def total(told: Iterable[bytes]) -> tuple[int, int]:
    """Return how many are right, of how many, over batches."""
    right, of = 0, 0
    for one in told:
        some, some_of = map(int, one.split()[:2])
        right, of = right + some, of + some_of
    return right, of


def _truths(store: ArtifactStore, batch: str) -> dict[bytes, str]:
    """Return what observations really show, by the names of their rows; the last word counts."""
    try:
        record = store.read_message(keys.reported(batch), monitor_pb2.ObservationBatch)
    except NotFound:
        return {}
    said = [
        record,
        *(store.read_message(key, monitor_pb2.ObservationBatch) for key in store.keys(keys.truths(batch))),
    ]
    return {keys.observation_digest(one.id): one.truth for word in said for one in word.observations if one.truth}
