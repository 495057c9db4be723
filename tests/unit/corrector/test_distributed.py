import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from services.corrector.distributed import torchrun_group
from services.corrector.finetune import finetune
from tests.unit.corrector.trainings import CPU, finetune_job, weights

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("processes", [2])
def test_several_processes_train_what_one_trains(tmp_path: Path, processes: int) -> None:
    """Under torchrun each process takes its part of every batch and the weights are those of one process.

    A training that the first process stops ends in all of them, one that had ended early ends again where it is taken
    up, and the next one is as if they had not been.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.unit.corrector.torchrun_worker", str(tmp_path / "found.npz")]
    done = subprocess.run(command, cwd=REPOSITORY, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    alone = finetune_job(seed=2)
    outcome = finetune(alone, device=CPU)
    assert (int(found["steps"]), int(found["best_step"])) == (outcome.steps, outcome.best_step)
    for number, weight in enumerate(weights(alone.network)):
        np.testing.assert_allclose(found[f"arr_{number}"], weight, atol=1e-5)


def test_outside_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrector that is started by itself trains alone, on the device that its settings name."""
    monkeypatch.delenv("RANK", raising=False)
    assert torchrun_group(torch.device("cpu")) == (None, torch.device("cpu"))
