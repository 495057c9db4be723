"""The memory shared with Triton, on the real Triton: used again, grown, given up with care, and gone in the end."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import numpy as np
import onnx
import pytest
from defuse.errors import Cancelled, Unavailable
from onnx import helper

from services.triton.client import InferenceClient
from services.triton.transport import AUTO, GRPC, SYSTEM_SHARED_MEMORY
from tests.conftest import ROOT, eventually
from tests.restartable_triton import TOLERANCE, Served, images, shared_files

# What is shared through /dev/shm; a GPU would be taken before it.
pytestmark = pytest.mark.usefixtures("no_gpu")

# Rounds of a loop in ONNX Runtime, which takes seconds, and the timeout of the request for it.
ROUNDS, REQUEST_TIMEOUT_S = 10_000_000, 1.0
SERVICE = """
import sys
import numpy as np
from defuse.v1 import model_pb2
from services.dependencies import Dependencies
from services.runtime.server import Service, serve
from services.dependencies import TransportSettings

def build(settings):
    needs = Dependencies.of(settings)
    model = model_pb2.Model.FromString(bytes.fromhex(sys.argv[1]))
    needs.inference.classifier(model, version=1).classify(np.zeros((9, 3, 8, 10), np.float32))
    print(needs.inference.transport, flush=True)
    return Service(names=[], register=lambda server: None, checks={"triton": needs.checks["triton"]})

serve("probe", TransportSettings.load(), build)
"""


def test_memory_is_used_again_and_grows(
    served: Served, shared: InferenceClient, own_files: Callable[[], list[str]]
) -> None:
    """Requests one after the other use one region; a larger batch replaces it, a smaller one does not."""
    classifier, seen = served.classifier(shared), []
    for count in (10, 20, 200, 10):
        classifier.classify(images(count))
        assert len(own_files()) == 1
        assert served.regions() == own_files()
        seen.append(own_files()[0])
    assert seen[0] == seen[1] != seen[2] == seen[3]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: /dev/shm as full as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_images_go_over_grpc_when_shared_memory_runs_out(served: Served, own_files: Callable[[], list[str]]) -> None:
    """Left to itself the client sends what finds no place in /dev/shm, and all after it, over gRPC."""
    with closing(InferenceClient(served.address, in_flight=1)) as client:
        classifier, batch = served.classifier(client), images(200)
        classifier.classify(batch[:10])
        with largest_file(128 * 1024):
            logits = classifier.classify(batch)
        np.testing.assert_allclose(logits, served.over_grpc(batch), **TOLERANCE)
        assert (client.transport, own_files(), served.regions()) == (GRPC, [], [])


def test_shared_memory_that_was_asked_for_runs_out(served: Served, shared: InferenceClient) -> None:
    """Asked for by name, memory that cannot be had is an error with the remedy; the client goes on once it can."""
    classifier = served.classifier(shared)
    with largest_file(128 * 1024), pytest.raises(Unavailable, match=r"'system-shared-memory'.*/dev/shm.*--shm-size"):
        classifier.classify(images(200))
    assert classifier.classify(images(200)).shape == (200, 3)


def test_memory_of_a_request_that_was_given_up_is_not_used_again(
    served: Served, own_files: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton may write to it yet: the next request gets other memory, and Triton lets go of the old in the end."""
    slow = served.put("slow", patient_classifier(), ("a", "b"))
    with closing(InferenceClient(served.address, in_flight=1)) as client:
        classifier, batch = served.classifier(client), images(40)
        expected = classifier.classify(batch)
        with monkeypatch.context() as patch:  # other requests keep the default timeout
            patch.setattr(client._in_flight, "_timeout_s", REQUEST_TIMEOUT_S)
            asked = client.classifier(slow, version=1).submit(np.full((1, 1, 1, 2), ROUNDS / 2, np.float32))
        [given_up] = own_files()
        with pytest.raises(Unavailable, match="Deadline"):
            asked.result()
        assert own_files() == []
        np.testing.assert_allclose(classifier.classify(batch), expected, **TOLERANCE)
        assert given_up in served.regions()
        assert given_up not in own_files()

        def gone() -> bool:
            with suppress(Unavailable):  # while the loop has its core
                classifier.classify(images(250))
            client._choice.close()
            return served.regions() == own_files()

        eventually(gone)


def test_closing_leaves_nothing(served: Served, own_files: Callable[[], list[str]]) -> None:
    """A closed client has no file in /dev/shm and no region at Triton; later calls raise."""
    client = InferenceClient(served.address, in_flight=2)
    classifier = served.classifier(client)
    pending = [classifier.submit(images(100)) for _ in range(4)]
    assert own_files()
    client.close()
    assert own_files() == served.regions() == []
    for answer in pending:
        assert answer.result().shape == (100, 3)
    with pytest.raises(Cancelled, match=f"{served.address} was closed"):
        classifier.classify(images(1))
    client.close()


def test_a_service_that_is_stopped_leaves_nothing(served: Served) -> None:
    """After SIGTERM nothing of the process is left, here or at Triton."""
    with service(served) as process:
        assert len(shared_files(process.pid)) == 1
        process.terminate()
        assert process.wait(30) == 0
    assert shared_files(process.pid) == served.regions(process.pid) == []


def test_what_a_killed_process_left_is_removed(served: Served) -> None:
    """After kill -9 the next process that shares memory with Triton removes what is left, here and at Triton."""
    with service(served) as process:
        process.kill()
    assert len(served.regions(process.pid)) == len(shared_files(process.pid)) == 1
    with closing(InferenceClient(served.address)) as client:
        assert client.transport == SYSTEM_SHARED_MEMORY
    assert shared_files(process.pid) == served.regions(process.pid) == []


def service(served: Served) -> "subprocess.Popen[str]":
    """Start a service that has sent images to Triton through shared memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, served.model.SerializeToString().hex()],
        env={**os.environ, "DEFUSE_TRITON_URL": served.address, "DEFUSE_TRITON_TRANSPORT": AUTO},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout
    assert process.stdout.readline().strip() == SYSTEM_SHARED_MEMORY
    return process


def patient_classifier() -> bytes:
    """Return an ONNX file that goes round a loop as often as the sum of its image says: on many cores no faster."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Neg", ["value"], ["negated"])],
        "body",
        [
            helper.make_tensor_value_info("round", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, ["batch", 2]),
        ],
        [
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("negated", onnx.TensorProto.FLOAT, ["batch", 2]),
        ],
    )
    nodes = [
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["rounds"], to=onnx.TensorProto.INT64),
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Loop", ["rounds", "", "flat"], ["logits"], body=body),
    ]
    graph = helper.make_graph(
        nodes,
        "patient",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 1, 1, 2])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
