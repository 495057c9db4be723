"""A small training that can be made in any process: two classes, a region against the rule, something held out."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from services.corrector.finetune import FinetuneJob, InputMap, LabelledDataset, TrainingMix
from services.corrector.training_state import Schedule

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
STEPS = 60


def finetune_job(*, seed: int, hopeless: bool = False) -> FinetuneJob:
    """Return a training of 60 steps, judged a dozen times; a hopeless one only gets worse on what is held out."""
    torch.manual_seed(0)
    held_out = _mix(seed + 100)
    if hopeless:
        held_out = TrainingMix(original=_contradicted(held_out.original), regions=_contradicted(held_out.regions))
    return FinetuneJob(
        network=nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)),
        data=_mix(seed),
        held_out=held_out,
        inputs=InputMap(prepare=lambda images: images),
        schedule=Schedule(epochs=12, learning_rate=0.01, region_weight=0.3, seed=seed, batch_size=32),
    )


def weights(network: nn.Module) -> list[Array]:
    return [parameter.detach().numpy() for parameter in network.parameters()]


def _contradicted(data: LabelledDataset) -> LabelledDataset:
    return LabelledDataset(fetch=data.fetch, labels=1 - data.labels)


def _mix(seed: int) -> TrainingMix:
    """Class 1 lies at x0 > 0, but for the region at x1 in 3 to 4, where all is class 1."""
    random = np.random.default_rng(seed)
    plain = random.uniform([-1, -1], [1, 1], (150, 2)).astype(np.float32)
    region = random.uniform([-1, 3], [0, 4], (60, 2)).astype(np.float32)
    return TrainingMix(
        original=LabelledDataset(fetch=lambda rows: plain[rows], labels=(plain[:, 0] > 0).astype(np.int64)),
        regions=LabelledDataset(fetch=lambda rows: region[rows], labels=np.ones(60, np.int64)),
    )
