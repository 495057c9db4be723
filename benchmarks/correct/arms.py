"""The compared arms: the corrector's stages on a finished run, by method, and the released recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from defuse import names
from defuse.v1 import correction_pb2, work_pb2
from defuse.v1.correction_pb2 import CorrectionConfig, Training

from benchmarks.stand import Search, Stand
from services.corrector.candidate_choice import CandidateChooser, choose_candidate
from services.corrector.gate.decision import Gate
from services.corrector.training import Trainer, train
from services.gateway.corrections.config import complete, trainings
from services.runtime.worker import Job
from services.storage import keys

OURS = (
    Training.METHOD_ALL_WEIGHTS,
    Training.METHOD_LAST_LAYER,
    Training.METHOD_INTERPOLATION,
    Training.METHOD_CONTINUED,
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One result: how it was made, and its file."""

    name: str
    region_weight: float
    share: float
    file: bytes
    chosen: bool = False

    @property
    def label(self) -> str:
        """Name and lambda, and the share of the way where it is not all of it."""
        return f"{self.name} {self.region_weight:g}" + (f" x {self.share:g}" if self.share < 1 else "")


def corrected(
    stand: Stand,
    search: Search,
    labelled: Sequence[correction_pb2.LabelledRegion],
    *,
    name: str,
    choosing: bool = False,
    **config: Any,
) -> list[Arm]:
    """Train in every way that a configuration tries, as the corrector does it; choose and serve if asked for."""
    correction = _correction(search, labelled, name, complete(CorrectionConfig(**config)))
    job = Job(correction.name, lambda _: None)
    trainer = Trainer(store=stand.store, device=torch.device(stand.context.device))
    for position in range(len(correction.trainings)):
        event = train(trainer, work_pb2.TrainWork(correction=correction, training=position), job)
        correction.trainings[position].CopyFrom(event.trained.training)
        print(f"  {name}: {_word(event.trained.training)}", flush=True)
    choice = correction_pb2.Choice()
    if choosing:
        gate = Gate(stand.store, stand.releases)
        chooser = CandidateChooser(store=stand.store, releases=stand.releases, gate=gate)
        event = choose_candidate(chooser, work_pb2.ChooseWork(correction=correction), job)
        choice.CopyFrom(event.corrected.result.choice)
    return [
        Arm(
            name="all_weights"
            if point.share == 1 and training.method == Training.METHOD_INTERPOLATION
            else _word(training),
            region_weight=training.region_weight,
            share=point.share,
            file=stand.store.read_bytes(keys.onnx_file(keys.point(correction.name, position, number))),
            chosen=(training.method, training.region_weight, point.share)
            == (choice.method, choice.region_weight, choice.share),
        )
        for position, training in enumerate(correction.trainings)
        for number, point in enumerate(training.points)
    ]


def _correction(
    search: Search, labelled: Sequence[correction_pb2.LabelledRegion], name: str, config: CorrectionConfig
) -> correction_pb2.Correction:
    return correction_pb2.Correction(
        name=names.correction(names.last(search.run.name), name),
        config=config,
        model=search.run.config.model,
        base_version=1,
        regions=labelled,
        trainings=trainings(config),
    )


def _word(training: Training) -> str:
    return Training.Method.Name(training.method).removeprefix("METHOD_").lower()
