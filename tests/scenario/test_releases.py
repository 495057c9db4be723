"""From a candidate to a release: the gate, trials on live requests, a switch that nobody notices, and its history."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import numpy_helper

from services.localstack.child_process import free_port
from tests.conftest import ROOT, TIMEOUT_S, Stack, eventually
from tests.planted import CLASSES, TRUE, Planted
from tests.scenario.conftest import corrected_spot, register

MODEL, RUN = "shipped", "shipping"
CANDIDATE = f"{MODEL}-candidate"


@pytest.fixture(scope="module")
def corrected(stack: Stack, planted: Planted) -> Any:
    """A finished correction of a model that no other test releases."""
    register(stack, planted, MODEL)
    return corrected_spot(stack, planted, MODEL, RUN)


@contextmanager
def another_gateway(stack: Stack, log: IO[str]) -> Iterator[str]:
    """Run a second gateway on the stack's queue, store and services as long as the block runs; give its address."""
    addresses = stack.state["addresses"]
    services = {f"DEFUSE_{name.upper()}_URL": addresses[name] for name in ("generator", "distiller", "corrector")}
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        **services,
        "DEFUSE_REDIS_URL": f"redis://{addresses['redis']}/0",
        "DEFUSE_TRITON_URL": addresses["triton"],
        "DEFUSE_STORE_URL": stack.store.url,
        "DEFUSE_PORT": address.rpartition(":")[2],
    }
    command = [sys.executable, "-m", "services.gateway"]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, stdout=log) as process:
        try:
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(TIMEOUT_S)
            yield address
        finally:
            process.terminate()


@contextmanager
def callers(stack: Stack, planted: Planted, *doors: str, **others: str) -> Iterator[Counter[str]]:
    """Ask about an image through doors without a pause as long as the block runs; count who answers, and what fails.

    `others` are the addresses of doors that the stack does not have by itself.
    """
    pixels = (planted.others[:1].transpose(0, 3, 1, 2) / 255 - float(planted.mean)) / float(planted.std)
    answered: Counter[str] = Counter()
    stop = threading.Event()

    def ask(address: str, door: str) -> None:
        with triton.InferenceServerClient(address) as client:
            image = triton.InferInput(client.get_model_metadata(MODEL).inputs[0].name, list(pixels.shape), "FP32")
            image.set_data_from_numpy(pixels.astype(np.float32))
            while not stop.is_set():
                try:
                    answer = client.infer(MODEL, [image]).get_response()
                    answered[f"{door} {answer.model_name} {answer.model_version}"] += 1
                except Exception as error:  # noqa: BLE001  # whatever a caller would see
                    answered[f"{door} failed: {error}"] += 1

    addresses = {"gateway": stack.gateway, "triton": stack.state["addresses"]["triton"]}
    asked = {**{door: addresses[door] for door in doors}, **others}
    threads = [threading.Thread(target=ask, args=(address, door)) for door, address in asked.items()]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len({answer.split()[0] for answer in list(answered)}) == len(asked))
        yield answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def failed(answered: Counter[str]) -> list[str]:
    return [answer for answer in answered if "failed" in answer]


def test_the_candidate_has_a_verdict(stack: Stack, corrected: Any) -> None:
    """The correction says what the gate said: everything was asked, and the spot is in the bank."""
    verdict = corrected["verdict"]
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    kinds = {check["kind"] for check in verdict["checks"]}
    assert kinds == {"file", "test", "class", "calibration", "region_gain", "region", "parity", "latency"}
    assert [check["subject"] for check in verdict["checks"] if check["kind"] == "region"] == [f"{RUN} r1"]
    with stack.client() as client:
        assert client.verdict(MODEL, verdict["id"]).passed


@pytest.mark.usefixtures("corrected")
def test_the_gate_is_asked_by_other_pipelines(stack: Stack, planted: Planted, tmp_path: Any) -> None:
    """The served file passes with status 0; one whose last bias was spoiled is stopped with 2, and says by what."""
    assert stack.defuse("gate", MODEL, "--onnx", planted.onnx)["passed"]
    model = onnx.load(planted.onnx)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [len(CLASSES)])
    values = numpy_helper.to_array(bias).copy()
    values[3] -= 20
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "worse.onnx")
    verdict = stack.defuse("gate", MODEL, "--onnx", tmp_path / "worse.onnx", status=2)
    stopped = {(check["kind"], check["subject"]) for check in verdict["checks"] if not check["passed"]}
    assert ("class", "3") in stopped
    assert not {kind for kind, _ in stopped} & {"file", "parity", "latency"}


def test_a_shadow_and_a_canary(local_stack: Stack, planted: Planted, corrected: Any) -> None:
    """In the shadow the champion answers and is compared; a canary answers its share until it is stopped."""
    stack = local_stack
    shadow = stack.defuse("trials", "start", RUN, "--share", "1", "--shadow", "--reason", "a look")
    with callers(stack, planted, "gateway") as answered:
        eventually(lambda: stack.defuse("trials", "show", MODEL, shadow["id"])["counts"]["compared"] > 20)
    assert set(answered) == {f"gateway {MODEL} 1"}
    ended = stack.defuse("trials", "stop", MODEL, shadow["id"])
    assert ended["state"] == "ended"
    assert ended["counts"]["agreed"] == ended["counts"]["compared"]

    canary = stack.defuse("trials", "start", RUN, "--share", "0.5", "--reason", "a try")
    challenger = f"gateway {CANDIDATE} {corrected['candidate_version']}"
    with callers(stack, planted, "gateway") as answered:
        eventually(lambda: answered[challenger] > 20)
        stack.defuse("trials", "stop", MODEL, canary["id"])
    assert set(answered) == {f"gateway {MODEL} 1", challenger}
    with callers(stack, planted, "gateway") as answered:
        eventually(lambda: answered.total() > 100)
    assert set(answered) == {f"gateway {MODEL} 1"}


def test_a_trial_at_two_gateways(local_stack: Stack, planted: Planted, corrected: Any, tmp_path: Path) -> None:
    """Both draw for a trial that was started at one of them, count together, and neither does when it has stopped."""
    stack = local_stack
    challenger = f"{CANDIDATE} {corrected['candidate_version']}"
    with (tmp_path / "gateway.log").open("w") as log, another_gateway(stack, log) as other:
        canary = stack.defuse("trials", "start", RUN, "--share", "0.5")
        with callers(stack, planted, "gateway", other=other) as answered:
            eventually(lambda: min(answered[f"{door} {challenger}"] for door in ("gateway", "other")) > 20)
            ended = stack.defuse("trials", "stop", MODEL, canary["id"])
        assert failed(answered) == []
        with callers(stack, planted, "gateway", other=other) as after:
            eventually(lambda: after.total() > 100)
        assert set(after) == {f"gateway {MODEL} 1", f"other {MODEL} 1"}
    drawn = sum(answered[f"{door} {challenger}"] for door in ("gateway", "other"))
    assert ended["counts"]["challenger_requests"] == drawn


@pytest.mark.usefixtures("corrected")
def test_nobody_notices_a_release(local_stack: Stack, planted: Planted) -> None:
    """Callers at both doors get the old or the new version, and after it the new one only; so with the way back."""
    stack = local_stack
    with callers(stack, planted, "gateway", "triton") as answered:
        released = stack.defuse("release", RUN, "--reason", "bold sevens", "--by", "anna")
        eventually(lambda: answered[f"gateway {MODEL} 2"] > 20 and answered[f"triton {MODEL} 2"] > 20)
    assert released["version"] == 2
    assert failed(answered) == []
    with callers(stack, planted, "gateway", "triton") as answered:
        eventually(lambda: answered.total() > 200)
    assert set(answered) == {f"gateway {MODEL} 2", f"triton {MODEL} 2"}

    with callers(stack, planted, "gateway", "triton") as answered:
        stack.defuse("rollback", MODEL, "--reason", "a drill", "--by", "otto")
        eventually(lambda: answered[f"gateway {MODEL} 1"] > 20 and answered[f"triton {MODEL} 1"] > 20)
    assert failed(answered) == []
    history = stack.defuse("releases", MODEL)
    assert [(one["kind"], one["version"], one["actor"], one["reason"]) for one in history[1:]] == [
        ("released", 2, "anna", "bold sevens"),
        ("rolled_back", 1, "otto", "a drill"),
    ]
    assert history[1]["verdict"]


@pytest.fixture
def guard(stack: Stack, corrected: Any) -> Any:
    """The guard of a release that was taken back; of one made for it where none was made before."""
    if not stack.defuse("guards", "list", MODEL):
        stack.defuse("release", RUN)
        stack.defuse("rollback", MODEL)
    return stack.defuse("guards", "list", MODEL)[-1]


def test_the_guard_of_a_release(stack: Stack, planted: Planted, guard: Any) -> None:
    """Real images of the spot, which nobody has seen, are in its region by name; of others as few as is stated."""
    assert guard["regions"] == {"r1": str(TRUE)}
    assert guard["model_version"] == 2
    correct = planted.others[planted.other_labels != TRUE]
    in_spot, elsewhere = (regions_of(stack, planted, images) for images in (planted.spot, correct[:400]))
    assert set(in_spot) | set(elsewhere) <= {f"runs/{RUN}/regions/r1", ""}
    found, false_alarms = (np.mean([region != "" for region in regions]) for regions in (in_spot, elsewhere))
    assert false_alarms < 3 * guard["false_alarm_rate"]
    assert found > max(0.4, 3 * false_alarms)


def regions_of(stack: Stack, planted: Planted, images: Any) -> list[str]:
    """Return the region that each of some stored images (n, h, w, c) is inside of, by asking for the guard."""
    pixels = (images.transpose(0, 3, 1, 2) / 255 - float(planted.mean)) / float(planted.std)
    regions = []
    with triton.InferenceServerClient(stack.gateway) as client:
        name = client.get_model_metadata(MODEL).inputs[0].name
        for part in np.array_split(pixels.astype(np.float32), -(-len(pixels) // 200)):
            tensor = triton.InferInput(name, list(part.shape), "FP32")
            tensor.set_data_from_numpy(part)
            answer = client.infer(MODEL, [tensor], headers={"defuse-guard": "true"})
            regions += [region.decode() for region in answer.as_numpy("defuse_region")[:, 0]]
    return regions


@pytest.mark.usefixtures("corrected")
def test_past_the_gate_only_by_name(stack: Stack) -> None:
    """A correction that gains nothing is refused with the check that failed, and released for who says why."""
    stack.defuse(
        *("correct", RUN, "--lambda", "0.3", "--learning-rate", "1e-9", "--method", "last_layer", "--epochs", "1"),
        "--wait",
    )
    assert "region gain" in stack.defuse("release", RUN, status=1)
    assert "gate" in stack.defuse("trials", "start", RUN, status=1)
    assert "region gain" in stack.defuse("release", RUN, "--approver", "anna", status=1)
    before = max(release["version"] for release in stack.defuse("releases", MODEL))
    stack.defuse("release", RUN, "--approver", "anna", "--reason", "a drill")
    last = stack.defuse("releases", MODEL)[-1]
    assert (last["approver"], last["reason"], last["version"]) == ("anna", "a drill", before + 1)
    assert stack.defuse("rollback", MODEL)["version"] == 1
