"""Trains as one of several processes that torchrun starts; the first one decides, and writes what came out."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defuse.errors import Cancelled

from services.corrector.distributed import TrainingAbandoned, torchrun_group
from services.corrector.finetune import finetune
from tests.unit.corrector.trainings import CPU, STEPS, finetune_job, weights

STOPPED_AT = 7


def main() -> None:
    """One after the other: stopped in its midst, ended early and taken up again, trained to its end."""
    torch.set_num_threads(1)
    process_group, device = torchrun_group(CPU)
    assert process_group
    assert device == CPU
    if process_group.rank:
        while (work := process_group.next_work()) is not None:
            seed, checkpoint = work
            with suppress(TrainingAbandoned):
                finetune(finetune_job(seed=seed), device=device, checkpoint=checkpoint, processes=process_group)
        process_group.close()
        return

    def stop(step: int, *_: Any) -> None:
        if step == STOPPED_AT:
            raise Cancelled("stopped")

    process_group.announce((1, None))
    with suppress(Cancelled):
        finetune(finetune_job(seed=1), device=device, on_step=stop, processes=process_group)
    checkpoints: list[bytes] = []
    early = finetune_job(seed=3, hopeless=True)
    process_group.announce((3, None))
    ended = finetune(early, device=device, on_checkpoint=checkpoints.append, processes=process_group)
    assert ended.steps < STEPS
    process_group.announce((3, checkpoints[-1]))
    again = finetune(
        finetune_job(seed=3, hopeless=True), device=device, checkpoint=checkpoints[-1], processes=process_group
    )
    assert again == ended
    process_group.announce((2, None))
    ready = finetune_job(seed=2)
    outcome = finetune(ready, device=device, processes=process_group)
    process_group.announce(None)
    np.savez(Path(sys.argv[1]), *weights(ready.network), steps=outcome.steps, best_step=outcome.best_step)
    process_group.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
