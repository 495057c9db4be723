"""A search, annotation and correction through the public client."""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from defuse import Client, Correction, Preprocessing, Region, Run, names

from benchmarks.correct.released import component_images
from benchmarks.planted.networks import TrainedNetwork
from benchmarks.planted.scores import Confusion, RegionReading
from benchmarks.stand import SMOKE, Array, Data
from services.arrays import as_floats
from services.datasets import SPLITS
from services.localstack.stack import LocalStack, StackSettings
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_MODEL, _RUN = "planted", "planted"
_SMOKE_SEARCH = {"draws_per_source": 10, "max_sources": 200}
# One training with one point, in place of a sweep.
_SMOKE_CORRECTION = {
    "epochs": 1,
    "images_per_region": 32,
    "region_weights": [0.5],
    "learning_rates": [1e-3],
    "methods": ["all_weights"],
}
# One answer of the gateway holds at most 1 MiB of decoded images.
_DECODED_BYTES = 1 << 19


@dataclass(kw_only=True)
class SessionRecord:
    """The results that a user of Defuse got for a classifier and its data."""

    run: Run
    regions: list[RegionReading] = field(default_factory=list)
    # Of each failure.
    failures: list[Confusion] = field(default_factory=list)
    correction: Correction | None = None
    # The corrected ONNX file; None without a correction.
    corrected: bytes | None = None
    # Region images (n, c, h, w) and labels of the released recipe; None where the run did not render `decoder`.
    released: tuple[Array, Array] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rendering(self) -> str:
        """Return the rendering that the run used."""
        return self.run.rendering


@dataclass(frozen=True, kw_only=True)
class UserInputs:
    """The inputs of a user, and the oracle that labels."""

    deployed: TrainedNetwork
    oracle: TrainedNetwork
    # Without the images of the spots.
    data: Data
    classes: tuple[str, ...]
    seed: int
    rendering: str
    smoke: bool


def run_session(inputs: UserInputs) -> SessionRecord:
    """Start a local stack and do a user's whole work on it."""
    with TemporaryDirectory(prefix="defuse-benchmark-") as home_:
        home = Path(home_)
        with LocalStack(StackSettings(home=home / "stack"), _say) as stack, Client(stack.gateway) as client:
            session = _Session(client, inputs, ArtifactStore(f"file://{home / 'stack' / 'store'}"))
            return session.work(home / "images.npz")


class _Session:
    def __init__(self, client: Client, inputs: UserInputs, store: ArtifactStore) -> None:
        self._client, self._inputs, self._store = client, inputs, store
        self._clock = _StageClock()

    def work(self, file: Path) -> SessionRecord:
        run = self._search(file)
        record = SessionRecord(run=run)
        if run.state == "succeeded":
            failures = self._failures()
            record.failures = list(
                zip(failures["true_label"].tolist(), failures["predicted_label"].tolist(), strict=True)
            )
            record.regions = self._annotate()
            self._clock.enter("")
            record.released = self._released_images(record, failures)
            self._correct(record)
        else:
            _say(f"the run {run.state}: {run.error}")
        record.seconds = self._clock.seconds()
        return record

    def _search(self, file: Path) -> Run:
        """Register the classifier, upload the images and search."""
        inputs, classes = self._inputs, list(self._inputs.classes)
        self._clock.enter("uploading")
        arrays = {f"x_{split}": inputs.data.images[split] for split in SPLITS}
        arrays |= {f"y_{split}": inputs.data.labels[split] for split in SPLITS}
        np.savez(file, class_names=np.array(classes), **arrays)
        preprocessing = Preprocessing(mean=inputs.deployed.mean, std=inputs.deployed.std)
        model = self._client.add_model(_MODEL, inputs.deployed.to_onnx(), classes, preprocessing)
        dataset = self._client.add_dataset(file, seed=inputs.seed)
        sections: dict[str, Any] = {**SMOKE} if inputs.smoke else {}
        search = {"rendering": inputs.rendering} | (_SMOKE_SEARCH if inputs.smoke else {})
        self._client.create_run(_RUN, model=model.id, dataset=dataset.id, seed=inputs.seed, search=search, **sections)
        return self._client.wait_for_run(_RUN, on_change=lambda run: self._clock.enter(run.state))

    def _failures(self) -> dict[str, Array]:
        """Return labels and latents of all failures."""
        found = [failure for batch in self._client.failures(_RUN) for failure in batch.failures]
        return {
            "source": np.array([failure.source for failure in found], np.int64),
            "true_label": np.array([failure.true_label for failure in found], np.int64),
            "predicted_label": np.array([failure.predicted_label for failure in found], np.int64),
            "latent": np.array([failure.latent for failure in found], np.float32),
        }

    def _annotate(self) -> list[RegionReading]:
        """Annotate each region as the oracle reads most of its pictures."""
        self._clock.enter("annotating")
        return [self._annotated(region) for region in self._client.regions(_RUN)]

    def _annotated(self, region: Region) -> RegionReading:
        classes = self._inputs.classes
        answers = self._inputs.oracle.answers(self._client.region(_RUN, region.id).exemplars).tolist()
        label, count = Counter(answers).most_common(1)[0]
        if 2 * count > len(answers):
            self._client.annotate(_RUN, region.id, label=classes[label], annotator="oracle")
        else:
            self._client.annotate(_RUN, region.id, verdict="invalid", annotator="oracle")
        predicted = classes.index(region.predicted_label)
        return RegionReading(
            confusion=(classes.index(region.true_label), predicted),
            oracle_agrees=2 * answers.count(predicted) > len(answers),
        )

    def _released_images(self, record: SessionRecord, failures: dict[str, Array]) -> tuple[Array, Array] | None:
        """Return the region images of the released recipe.

        It only knows decoded latents.
        """
        if record.rendering == "residual" or not record.failures:
            return None
        space = self._client.latent_space(_RUN)
        at_once = max(1, _DECODED_BYTES // int(np.prod(self._inputs.deployed.image_shape)))

        def decode(latents: Array) -> Array:
            parts = [space.decode(latents[begin : begin + at_once]) for begin in range(0, len(latents), at_once)]
            return as_floats(np.concatenate(parts))

        return component_images(failures, decode, seed=self._inputs.seed)

    def _correct(self, record: SessionRecord) -> None:
        """Correct with the labelled regions and take the chosen file.

        The client has no call for a candidate's file: it is read where the stack stores it.
        """
        if not any(region.state == "labelled" for region in self._client.regions(_RUN)):
            return
        self._clock.enter("correcting")
        settings: dict[str, Any] = _SMOKE_CORRECTION if self._inputs.smoke else {}
        started = self._client.create_correction(_RUN, seed=self._inputs.seed, **settings)
        record.correction = self._client.wait_for_correction(_RUN, started.id)
        if record.correction.state == "succeeded":
            name = names.correction(_RUN, started.id)
            record.corrected = self._store.read_bytes(keys.corrected_file(name))
        else:
            _say(f"the correction {record.correction.state}: {record.correction.error}")


class _StageClock:
    """Sums the seconds of each stage."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._stage, self._begin = "", time.perf_counter()

    def enter(self, stage: str) -> None:
        now = time.perf_counter()
        if stage != self._stage:
            if stage:
                _say(stage)
            self._seconds[self._stage] += now - self._begin
            self._stage, self._begin = stage, now

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all stages so far."""
        self.enter("")
        ended = {"", "succeeded", "failed", "cancelled"}
        return {stage: round(seconds, 1) for stage, seconds in self._seconds.items() if stage not in ended}


def _say(line: str) -> None:
    print(line, flush=True)
