"""Which transport is chosen, and when; on servers that are no Triton, or on none."""

import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from defuse.errors import Unavailable
from structlog.testing import capture_logs

from services.localstack.child_process import free_port
from services.triton.client import InferenceClient
from services.triton.transport import AUTO, CUDA_SHARED_MEMORY, GRPC, SYSTEM_SHARED_MEMORY, TransportSetting

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def stranger() -> Iterator[str]:
    """A gRPC server that refuses every call, as a server of the inference protocol without shared memory would."""
    with futures.ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()


def test_auto_falls_back_where_shared_memory_is_refused(stranger: str) -> None:
    """A server that answers, and refuses, is sent images over gRPC; the event says what was refused and why."""
    client = InferenceClient(stranger)
    with capture_logs() as events:
        assert client.transport == GRPC
    [event] = events
    assert (event["event"], event["transport"], event["wanted"], event["triton"]) == (
        "triton_transport",
        GRPC,
        AUTO,
        stranger,
    )
    assert stranger in event["refused"][SYSTEM_SHARED_MEMORY]
    assert "/dev/shm" in event["refused"][SYSTEM_SHARED_MEMORY]


def test_many_threads_choose_once(stranger: str) -> None:
    """Threads that ask at the same time get the same answer, which is found out and logged once."""
    client, together, found = InferenceClient(stranger), threading.Barrier(8), []

    def ask() -> None:
        together.wait()
        found.append(client.transport)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    with capture_logs() as events:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert found == [GRPC] * 8
    assert len(events) == 1


@pytest.mark.parametrize("wanted", [AUTO, SYSTEM_SHARED_MEMORY])
def test_nothing_is_chosen_while_nobody_answers(wanted: TransportSetting) -> None:
    """An absent Triton is no reason for gRPC: it is Unavailable, and the next use asks again."""
    client = InferenceClient(f"127.0.0.1:{free_port()}", transport=wanted)
    with capture_logs() as events:
        for _ in range(2):
            with pytest.raises(Unavailable, match="does not answer") as caught:
                _ = client.transport
            assert caught.value.reason == "TRITON_UNAVAILABLE"
    assert events == []


def test_what_was_asked_for_is_not_replaced(stranger: str) -> None:
    """A transport asked for by name that is refused is an error with the setting, the reason and the remedy."""
    client = InferenceClient(stranger, transport=SYSTEM_SHARED_MEMORY)
    for _ in range(2):
        with pytest.raises(Unavailable, match=f"'system-shared-memory'.*{stranger}.*--ipc=host.*'auto'") as caught:
            _ = client.transport
        assert caught.value.reason == "TRANSPORT_REFUSED"
    assert "DEFUSE_TRITON_TRANSPORT" in caught.value.message


def test_cuda_without_a_gpu(stranger: str) -> None:
    """CUDA shared memory is never chosen on a CPU, and says what is missing when it is asked for."""
    assert InferenceClient(stranger).transport == GRPC
    with pytest.raises(Unavailable, match=r"'cuda-shared-memory'.*(cuda-python|CUDA device).*'auto'"):
        _ = InferenceClient(stranger, transport=CUDA_SHARED_MEMORY).transport


def test_grpc_asks_nobody() -> None:
    """Plain gRPC is taken at its word, without a server."""
    assert InferenceClient(f"127.0.0.1:{free_port()}", transport=GRPC).transport == GRPC
