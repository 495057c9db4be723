"""Corrections of the planted classifier beyond the usual one: shared, by several processes, from torch."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import onnx
import pytest

from tests.conftest import ROOT, Stack
from tests.planted import TRUE, Planted
from tests.scenario.conftest import RUN_TIMEOUT_S

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture
def annotated(local_stack: Stack, undisturbed: Any) -> str:
    """A finished run whose spot has its label."""
    run: str = undisturbed["id"]
    local_stack.defuse("annotate", run, "r1", "--label", str(TRUE), "--annotator", "tester")
    return run


@contextmanager
def another_corrector(stack: Stack, launcher: Sequence[str], log: IO[str]) -> Iterator[None]:
    """Start a second corrector on the stack's queue, store and repository, while the first one sleeps."""
    state = stack.state
    environment = {
        **os.environ,
        "DEFUSE_REDIS_URL": f"redis://{state['addresses']['redis']}/0",
        "DEFUSE_TRITON_URL": state["addresses"]["triton"],
        "DEFUSE_TRITON_REPOSITORY": f"{stack.home}/models",
        "DEFUSE_STORE_URL": stack.store.url,
        "DEFUSE_CLAIM_AFTER_S": "3",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, "-m", "services.corrector"]
    os.kill(state["pids"]["corrector"], signal.SIGSTOP)
    try:
        with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, stdout=log) as process:
            yield
            process.terminate()
    finally:
        os.kill(state["pids"]["corrector"], signal.SIGCONT)


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "torchrun"])
def test_another_corrector_takes_a_sweep(
    local_stack: Stack, annotated: str, launcher: Sequence[str], tmp_path: Any
) -> None:
    """Correctors share a queue: while one hangs, another makes its trainings and the choice; under torchrun, too."""
    log = tmp_path / "corrector.log"
    with log.open("w") as file, another_corrector(local_stack, launcher, file), local_stack.client() as client:
        started = client.create_correction(
            annotated, region_weights=[0.3, 0.5], learning_rates=[1e-3], methods=["all_weights"], epochs=2
        )
        ended = client.wait_for_correction(annotated, started.id, timeout_s=RUN_TIMEOUT_S)
        assert ended.state == "succeeded", ended.error
        assert len(ended.points) == 2
        assert ended.regions_after.value > ended.regions_before.value
    handled = [json.loads(line) for line in log.read_text().splitlines() if '"message_handled"' in line]
    assert [entry["outcome"] for entry in handled] == ["done"] * 3


def test_a_correction_from_a_torch_factory(local_stack: Stack, annotated: str, planted: Planted) -> None:
    """Torch and its weights stand in for the file: corrected, measured, served under the names that callers know."""
    corrected = local_stack.defuse(
        *("correct", annotated, "--torch-factory", "tests.planted:untrained", "--weights", planted.weights),
        *("--lambda", "0.4", "--learning-rate", "1e-3", "--method", "all_weights,last_layer"),
        *("--epochs", "4", "--wait"),
    )
    assert corrected["config"]["torch_factory"] == "tests.planted:untrained"
    assert corrected["regions"][0]["after"]["value"] > 0.6
    file = local_stack.store.read_bytes(f"runs/{annotated}/corrections/{corrected['id']}/model.onnx")
    served, before = onnx.load_model_from_string(file).graph, onnx.load(planted.onnx).graph
    for one, other in ((served.input, before.input), (served.output, before.output)):
        assert [value.name for value in one] == [value.name for value in other]


def test_the_wrong_weights_are_refused(local_stack: Stack, annotated: str) -> None:
    """Weights that are no safetensors file end the correction with a sentence, and exit status 2."""
    local_stack.defuse(
        *(
            "correct",
            annotated,
            "--torch-factory",
            "tests.planted:untrained",
            "--weights",
            ROOT / "README.md",
            "--wait",
        ),
        status=2,
    )
    with local_stack.client() as client:
        assert "do not fit" in client.corrections(annotated)[-1].error
