"""Batches of observations that a gateway takes or refuses as a whole, in messages that it takes."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from defuse.hooks.observation import MOST_BYTES
from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

MOST_OBSERVATIONS = 256
MOST_BATCH_BYTES = 4 * 1024 * 1024
# What a message says of one more observation, beside the observation itself.
_FRAME_BYTES = 8


@dataclass(kw_only=True)
class Batch:
    """Observations of one model whose images and scores have one size, so that all of them are right or none is."""

    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    observations: dict[str, monitor_pb2.Observation] = field(default_factory=dict)
    size: int = 0

    def without(self, observation_id: str) -> "Batch":
        """Return a batch of the others."""
        others = {id_: one for id_, one in self.observations.items() if id_ != observation_id}
        return Batch(model=self.model, observations=others)

    def requests(self) -> list[pb.ReportRequest]:
        """Return the messages that report it."""
        request = pb.ReportRequest(model=f"models/{self.model}", batch_id=self.id)
        requests, size = [request], 0
        for observation in self.observations.values():
            more = observation.ByteSize() + _FRAME_BYTES
            if size + more > MOST_BYTES:
                requests.append(pb.ReportRequest())
                size = 0
            requests[-1].observations.append(observation)
            size += more
        return requests


def batches(observations: Iterable[tuple[str, monitor_pb2.Observation]]) -> Iterator[Batch]:
    """Put observations of models together; the same id goes to a batch once, and to another one the second time.

    One that is not of the model's size is refused with its batch: sizes are kept apart.
    """
    begun: dict[tuple[str, int, int, int], Batch] = {}
    for model, observation in observations:
        key = (model, len(observation.input), len(observation.picture), len(observation.scores))
        batch = begun.setdefault(key, Batch(model=model))
        size = observation.ByteSize() + _FRAME_BYTES
        full = len(batch.observations) == MOST_OBSERVATIONS or batch.size + size > MOST_BATCH_BYTES
        if full or observation.id in batch.observations:
            yield batch
            begun[key] = batch = Batch(model=model)
        batch.observations[observation.id] = observation
        batch.size += size
    yield from begun.values()
