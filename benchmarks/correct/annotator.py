"""A person who labels, simulated: reads pictures as a classifier does that never met the planted mistakes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from defuse.v1 import correction_pb2, model_pb2, region_pb2

from benchmarks.stand import Array, Stand
from services.storage import keys


@dataclass(kw_only=True)
class Annotator:
    """Counts its decisions: one for each region or image that it is shown."""

    stand: Stand
    oracle: model_pb2.Model
    # Of the pictures of a region, the share that must show one class for it to be labelled as a whole.
    agreeing: float = 0.8
    decisions: int = field(default=0)

    def label(self, regions: Sequence[region_pb2.Region]) -> list[correction_pb2.LabelledRegion]:
        """Look at the pictures of every region; label those that show one class, leave out the others."""
        labelled = []
        for region in regions:
            self.decisions += 1
            pictures = self.stand.store.read_arrays(keys.region_arrays(region.name))["exemplars"]
            answer, count = Counter(self._read(pictures)).most_common(1)[0]
            if count >= self.agreeing * len(pictures):
                labelled.append(correction_pb2.LabelledRegion(region=region.name, label=answer))
        return labelled

    def _read(self, pictures: Array) -> list[str]:
        logits = self.stand.inference.classifier(self.oracle, version=1).classify_stored(pictures)
        return [self.oracle.classes[answer] for answer in np.asarray(logits.argmax(axis=1))]
