"""The monitor between a fake classifier and a fake gateway."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from defuse.errors import InvalidInput, Unavailable
from defuse.hooks import DeliveryCounts, Monitor, Observation
from tritonclient.grpc import service_pb2 as oip

from tests.conftest import eventually
from tests.unit.client.hooks.servers import CLASSES, MODEL, Classifier, Gateway, infer_request

Make = Callable[..., Monitor]
Hooked = Callable[[Monitor], Any]
WAIT_S = 60.0


def wait_until_settled(monitor: Monitor, seen: int) -> DeliveryCounts:
    """Wait until `seen` observations were seen and none waits.

    Check the sum of counts meanwhile.
    """

    def done() -> bool:
        counts = balanced(monitor.counts)
        return counts.seen == seen and not counts.waiting

    eventually(done)
    return monitor.counts


def balanced(counts: DeliveryCounts) -> DeliveryCounts:
    assert counts.seen == counts.not_sampled + counts.stored + counts.waiting + sum(counts.dropped.values())
    return counts


def test_request_and_response(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Input, scores and version are reported under the request's id."""
    monitor = monitored()
    request = infer_request("order-1", value=0.5)
    hooked(monitor).ModelInfer(request)
    assert wait_until_settled(monitor, 1) == DeliveryCounts(seen=1, not_sampled=0, stored=1, waiting=0, dropped={})
    model, observation = gateway.stored["order-1"]
    assert (model, observation.version) == ("models/tiny", "7")
    assert observation.input == request.raw_input_contents[0]
    assert list(observation.scores) == [0, 1, 2]
    assert observation.time.seconds > 0


def test_batch_of_images(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Each row becomes an observation with its own image and scores."""
    monitor = monitored()
    hooked(monitor).ModelInfer(infer_request("b", 3))
    wait_until_settled(monitor, 3)
    assert sorted(gateway.stored) == ["b-0", "b-1", "b-2"]
    for row in range(3):
        observation = gateway.observation(f"b-{row}")
        np.testing.assert_array_equal(np.frombuffer(observation.input, "<f4"), 4 * row + np.arange(4))
        assert list(observation.scores) == [CLASSES * row, CLASSES * row + 1, CLASSES * row + 2]


def test_calls_are_unchanged(monitored: Make, hooked: Hooked, classifier: Classifier, gateway: Gateway) -> None:
    """Request and response are unchanged to the byte, also without an id."""
    monitor = monitored()
    request = infer_request(count=2)
    before = request.SerializeToString(deterministic=True)
    response = hooked(monitor).ModelInfer(request)
    assert classifier.requests == [before]
    assert request.SerializeToString(deterministic=True) == before
    assert response.SerializeToString(deterministic=True) == classifier.responses[0]
    wait_until_settled(monitor, 2)
    assert len({id_.rpartition("-")[0] for id_ in gateway.stored}) == 1


def test_reused_request_message(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """The report is that of the call, whatever its caller changes."""
    monitor = monitored()
    stub, request = hooked(monitor), infer_request("first", value=1.0)
    stub.ModelInfer(request)
    request.id = "second"
    request.raw_input_contents[0] = np.full(4, 9, "<f4").tobytes()
    stub.ModelInfer(request)
    wait_until_settled(monitor, 2)
    assert np.frombuffer(gateway.observation("first").input, "<f4").tolist() == [1, 2, 3, 4]
    assert np.frombuffer(gateway.observation("second").input, "<f4").tolist() == [9, 9, 9, 9]


def test_futures_and_callbacks(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Asynchronous calls are reported when their responses arrive."""
    monitor = monitored()
    stub = hooked(monitor)
    futures = [stub.ModelInfer.future(infer_request(f"f{number}")) for number in range(5)]
    assert [future.result(timeout=WAIT_S).model_version for future in futures] == ["7"] * 5
    response, call = stub.ModelInfer.with_call(infer_request("called"))
    assert (response.model_version, call.code()) == ("7", grpc.StatusCode.OK)
    wait_until_settled(monitor, 6)
    assert set(gateway.stored) == {"f0", "f1", "f2", "f3", "f4", "called"}


def test_failed_call(monitored: Make, hooked: Hooked) -> None:
    """The caller receives the error; nothing is reported."""
    monitor = monitored()
    stub = hooked(monitor)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer_request(model="broken"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
    assert stub.ModelInfer.future(infer_request(model="broken")).exception(timeout=WAIT_S).details() == "broken"
    assert monitor.counts.seen == 0


def test_other_methods_are_ignored(monitored: Make, hooked: Hooked) -> None:
    monitor = monitored()
    assert hooked(monitor).ServerLive(oip.ServerLiveRequest()).live
    assert monitor.counts.seen == 0


def test_share(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """The requested share is reported, the same ids each time."""
    for _ in range(2):
        monitor = monitored(share=0.3)
        stub = hooked(monitor)
        for number in range(60):
            stub.ModelInfer(infer_request(f"s{number}"))
        counts = wait_until_settled(monitor, 60)
        assert 5 < counts.sampled < 35
        assert counts.not_sampled + counts.sampled == 60
    assert len(gateway.stored) == counts.sampled
    assert counts.dropped == {"repeated": counts.sampled}


def test_log(monitored: Make, gateway: Gateway) -> None:
    """Pictures, real numbers and bytes have their fields.

    A caller may reuse the array.
    """
    monitor = monitored()
    picture, reals = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.arange(4.0).reshape(1, 2, 2)
    monitor.log(MODEL, picture, [0.5, 0.25, 0.25], id="picture", version="3")
    monitor.log(MODEL, reals, np.array([1.0, 2.0, 3.0]), id="reals")
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="bytes")
    monitor.log(MODEL, None, [1, 2, 3])
    picture[:] = 0
    reals[:] = 0
    wait_until_settled(monitor, 4)
    found = {id_: gateway.observation(id_) for id_ in ("picture", "reals", "bytes")}
    assert (found["picture"].picture, found["picture"].version) == (bytes(range(12)), "3")
    assert list(found["picture"].scores) == [0.5, 0.25, 0.25]
    assert found["reals"].input == np.arange(4, dtype="<f4").tobytes()
    assert found["bytes"].input == b"abcd"


@pytest.mark.parametrize(
    ("image", "scores", "id_", "reason"),
    [
        (np.zeros((2, 2, 1), np.int64), [1, 2, 3], "a", "bad_image"),
        (b"abcd", [1, 2, float("nan")], "a", "bad_scores"),
        (b"abcd", [1, 2, 3], "a\nb", "bad_id"),
        (b"abcd", [1, 2, 3], "a" * 129, "bad_id"),
        (bytes(1 << 20), [1, 2, 3], "a", "too_large"),
        (None, [], "a", "empty"),
        (b"abcd", "three", "a", "defect"),
    ],
)
def test_invalid_observations(monitored: Make, image: Any, scores: Any, id_: str, reason: str) -> None:
    """They are dropped by reason without an exception.

    Valid ones beside them are stored.
    """
    monitor = monitored()
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="right")
    monitor.log(MODEL, image, scores, id=id_)
    counts = wait_until_settled(monitor, 2)
    assert (counts.stored, counts.dropped) == (1, {reason: 1})


def test_redaction(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """The redacted observation is reported; withheld ones and errors are counted."""

    def redact(observation: Observation) -> Observation | None:
        if observation.id == "secret":
            return None
        if observation.id == "fatal":
            raise ValueError("planted")
        if observation.id == "odd":
            return "odd"  # type: ignore[return-value]
        assert observation.shape == (1, 2, 2)
        return dataclasses.replace(observation, input=bytes(16), id=observation.id.upper())

    monitor = monitored(redact=redact)
    stub = hooked(monitor)
    for id_ in ("secret", "fatal", "fatal", "odd", "plain"):
        stub.ModelInfer(infer_request(id_))
    counts = wait_until_settled(monitor, 5)
    assert (counts.stored, counts.dropped) == (1, {"withheld": 1, "redact": 3})
    assert gateway.observation("PLAIN").input == bytes(16)


def test_truth_follows_its_observation(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Truths are attached after their observations; unknown ids are counted."""
    monitor = monitored()
    gateway.responding.clear()
    hooked(monitor).ModelInfer(infer_request("pair", 2))
    monitor.truth(MODEL, "pair-1", "bee")
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="known", truth="ant")
    monitor.truth(MODEL, "nobody", "ant")
    gateway.responding.set()
    wait_until_settled(monitor, 3)
    eventually(lambda: not monitor.truth_counts.waiting)
    assert gateway.truths == {"pair-1": "bee", "known": "ant"}
    assert gateway.calls[0] == "Report"
    truths = balanced(monitor.truth_counts)
    assert (truths.seen, truths.stored, truths.dropped) == (3, 2, {"unknown": 1})


def test_truth_of_an_unknown_class(monitored: Make, gateway: Gateway) -> None:
    """It is refused alone; the truths beside it are attached."""
    monitor = monitored()
    gateway.responding.clear()
    for number, label in enumerate(("ant", "no class", "bee")):
        monitor.log(MODEL, b"abcd", [1, 2, 3], id=f"t{number}", truth=label)
    gateway.responding.set()
    eventually(lambda: monitor.truth_counts.seen == 3 and not monitor.truth_counts.waiting)
    assert gateway.truths == {"t0": "ant", "t2": "bee"}
    assert monitor.truth_counts.dropped == {"invalid_argument": 1}


def test_truth_of_an_unsampled_observation(monitored: Make) -> None:
    """It is not sent, like its observation."""
    monitor = monitored(share=0.0)
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="a", truth="ant")
    monitor.truth(MODEL, "a", "ant")
    assert (monitor.counts.not_sampled, monitor.truth_counts.not_sampled) == (1, 1)


def test_close(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Waiting observations are reported first; later ones are dropped and counted."""
    monitor = monitored()
    stub = hooked(monitor)
    stub.ModelInfer(infer_request("before"))
    monitor.close(WAIT_S)
    assert set(gateway.stored) == {"before"}
    assert stub.ModelInfer(infer_request("after")).model_version == "7"
    assert balanced(monitor.counts).dropped == {"closed": 1}


def test_end_of_a_program(gateway: Gateway) -> None:
    """A program without `close` has reported its observations when it ends."""
    program = f"""
from defuse.hooks import Monitor
monitor = Monitor({gateway.address!r})
monitor.log("tiny", b"abcd", [1, 2, 3], id="last words")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)
    assert set(gateway.stored) == {"last words"}


def test_imports() -> None:
    """The hooks import neither tritonclient nor the services."""
    program = "import json, sys, defuse.hooks; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=WAIT_S)
    assert not {"tritonclient", "services", "torch"} & set(json.loads(done.stdout))


def test_invalid_arguments() -> None:
    """Invalid arguments raise at once."""
    with pytest.raises(InvalidInput, match=r"share is 1.5"):
        Monitor("127.0.0.1:1", share=1.5)
    with pytest.raises(InvalidInput, match="in the clear"):
        Monitor("gateway.example:1", token="secret")


def test_no_gateway_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("DEFUSE_GATEWAY", raising=False)
    monkeypatch.setenv("DEFUSE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="DEFUSE_GATEWAY is not set"):
        Monitor()
