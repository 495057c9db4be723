"""For any disturbance of the processes, a run ends with the failures of an undisturbed one."""

import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Stack, eventually
from tests.planted import Planted
from tests.scenario.conftest import RUN_TIMEOUT_S, SEARCH, same_failures, second_generator

Start = Callable[[str], None]


@pytest.fixture
def start(local_stack: Stack, planted: Planted, served: str, undisturbed: Any) -> Start:
    """Start a run like the undisturbed one, in smaller shards, so that there is a middle to disturb."""

    def start_run(name: str) -> None:
        with local_stack.client() as client:
            client.create_run(
                name,
                model=served,
                dataset=undisturbed["dataset"],
                search={"draws_per_source": int(SEARCH[3]), "shard_size": 50, "rendering": "decoder"},
                vae={"epochs": int(SEARCH[1])},
            )

    return start_run


def _reach(stack: Stack, run: str, state: str, *, sources: int = 0) -> None:
    with stack.client() as client:
        eventually(lambda: client.run(run).state == state and client.run(run).counts.sources >= sources)


def _finish(stack: Stack, run: str) -> None:
    with stack.client() as client:
        ended = client.wait_for_run(run, timeout_s=RUN_TIMEOUT_S)
    assert ended.state == "succeeded", ended.error
    assert same_failures(stack, "undisturbed", run)


def test_a_killed_generator(local_stack: Stack, start: Start) -> None:
    """Kill -9 of the generator in mid-search loses nothing and changes nothing."""
    start("generator-killed")
    _reach(local_stack, "generator-killed", "identifying", sources=1)
    local_stack.kill("generator")
    _finish(local_stack, "generator-killed")


def test_a_generator_killed_in_training(local_stack: Stack, start: Start, undisturbed: Any) -> None:
    """Kill -9 while the VAE is trained: training goes on from the last epoch that was finished."""
    epochs: list[int] = []
    with local_stack.client() as client:
        client.create_run(
            "trainer-killed", model=undisturbed["model"], dataset=undisturbed["dataset"], vae={"epochs": 6}
        )
        for run in client.watch_run("trainer-killed", timeout_s=RUN_TIMEOUT_S):
            if found := re.search(r"training the VAE, epoch (\d+) of 6", run.note):
                epochs.append(int(found[1]))
                if len(epochs) == 3:
                    local_stack.kill("generator")
            if run.state != "preparing":
                client.cancel_run("trainer-killed")
    assert epochs == sorted(set(epochs)), "an epoch was trained twice"
    assert epochs[-1] == 6


def test_a_killed_distiller(local_stack: Stack, start: Start) -> None:
    """Kill -9 of the distiller while it groups: another one takes the message, with the same regions."""
    start("distiller-killed")
    _reach(local_stack, "distiller-killed", "distilling")
    local_stack.kill("distiller")
    _finish(local_stack, "distiller-killed")
    regions = [
        [(r["id"], r["size"], r["true_label"]) for r in local_stack.defuse("regions", "list", run)]
        for run in ("undisturbed", "distiller-killed")
    ]
    assert regions[0] == regions[1]


def test_a_killed_redis(local_stack: Stack, start: Start) -> None:
    """Kill -9 of Redis in mid-search: the run waits, and goes on where it was."""
    start("redis-killed")
    _reach(local_stack, "redis-killed", "identifying", sources=1)
    local_stack.kill("redis")
    _finish(local_stack, "redis-killed")


def test_two_generators_find_what_one_finds(local_stack: Stack, start: Start) -> None:
    """A second generator on the same run takes a part of the shards and changes no failure."""
    with second_generator(local_stack) as log:
        start("two-generators")
        _finish(local_stack, "two-generators")
    assert '"outcome": "done"' in "".join(log)


def test_a_killed_corrector(local_stack: Stack, undisturbed: Any) -> None:
    """Kill -9 of the corrector in mid-training: the correction is made all the same."""
    run = undisturbed["id"]
    local_stack.defuse("annotate", run, "--suggested")
    with local_stack.client() as client:
        correction = client.create_correction(
            run, region_weights=[0.1, 0.4], learning_rates=[1e-3], methods=["all_weights"], epochs=3
        )
        eventually(lambda: client.correction(run, correction.id).progress > 0.1)
        local_stack.kill("corrector")
        ended = client.wait_for_correction(run, correction.id, timeout_s=RUN_TIMEOUT_S)
    assert ended.state == "succeeded", ended.error
    assert ended.regions_after.value > ended.regions_before.value


def test_a_silent_triton_is_named(local_stack: Stack, undisturbed: Any) -> None:
    """A run cannot be started while Triton does not answer; the error names it."""
    triton = local_stack.state["pids"]["triton"]
    os.kill(triton, signal.SIGSTOP)
    try:
        said = local_stack.defuse(
            *("runs", "create", "--model", undisturbed["model"], "--name", "no-triton"),
            *("--data", "https://127.0.0.1:9/images.npz"),
            status=1,
        )
        assert "127.0.0.1:9" in said
        with local_stack.client() as client, pytest.raises(Exception, match="Triton at") as refused:
            client.create_run("no-triton", model=undisturbed["model"], dataset=undisturbed["dataset"])
        assert refused.value.reason == "TRITON_UNAVAILABLE"
    finally:
        os.kill(triton, signal.SIGCONT)
