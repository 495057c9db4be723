"""The client with a fake generator: failures and the latent space."""

import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from defuse import Client, connection, tensors
from defuse.errors import NotReady, Unavailable, to_status
from defuse.v1 import failure_pb2
from defuse.v1 import generator_service_pb2 as pb
from defuse.v1 import generator_service_pb2_grpc as pb_grpc
from grpc_status import rpc_status

BATCHES = 5
TIMEOUT_S = 60


class Generator(pb_grpc.GeneratorServiceServicer):
    """Sends one failure per batch, breaks once after the second.

    Its VAE halves and doubles.
    """

    def __init__(self) -> None:
        self.resume_tokens: list[str] = []
        self.abandoned = threading.Event()

    def Identify(self, request: pb.IdentifyRequest, context: Any) -> Iterator[pb.IdentifyResponse]:  # noqa: N802  # gRPC's name
        context.add_callback(self.abandoned.set)
        self.resume_tokens.append(request.resume_token)
        if request.run == "runs/refused":
            context.abort_with_status(rpc_status.to_status(to_status(NotReady("mush", reason="VAE_TOO_COARSE"))))
        for number in range(int(request.resume_token or 0), BATCHES):
            if number == 2 and len(self.resume_tokens) == 1:
                context.abort_with_status(rpc_status.to_status(to_status(Unavailable("Redis does not answer"))))
            yield pb.IdentifyResponse(
                failures=[failure_pb2.Failure(source=number, latent=[0.0])], resume_token=str(number + 1)
            )
        while request.run == "runs/endless" and context.is_active():
            self.abandoned.wait(0.1)

    def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:  # noqa: N802
        pixels = tensors.images_from_proto(request.images).astype(np.float32).reshape(request.images.shape[0], -1)
        return pb.EncodeResponse(mu=tensors.floats_to_proto(pixels / 2), sigma=tensors.floats_to_proto(pixels))

    def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.DecodeResponse:  # noqa: N802
        pixels = (2 * tensors.floats_from_proto(request.latents)).astype(np.uint8)
        return pb.DecodeResponse(images=tensors.images_to_proto(pixels.reshape(-1, 2, 2, 1)))

    def Interpolate(self, request: pb.InterpolateRequest, context: Any) -> pb.InterpolateResponse:  # noqa: N802
        first, last = tensors.images_from_proto(request.ends)
        frames = np.linspace(first, last, request.frames).astype(np.uint8)
        return pb.InterpolateResponse(
            images=tensors.images_to_proto(frames), predicted_labels=list(range(request.frames))
        )


@pytest.fixture
def generator() -> Generator:
    return Generator()


@pytest.fixture
def client(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(connection, "_RECONNECT_S", 0.0)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GeneratorServiceServicer_to_server(generator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as found:
        yield found
    server.stop(None).wait()


def test_failures_resume_after_a_broken_stream(client: Client, generator: Generator) -> None:
    """The reader sees one stream without repetitions."""
    batches = list(client.failures("first"))
    assert [failure.source for batch in batches for failure in batch.failures] == list(range(BATCHES))
    assert generator.resume_tokens == ["", "2"]


def test_failures_resume_from_a_token(client: Client, generator: Generator) -> None:
    """Another process resumes after the batch of a token."""
    assert [batch.failures[0].source for batch in client.failures("first", resume_token="3")] == [3, 4]
    assert generator.resume_tokens == ["3"]


def test_closing_the_iterator_cancels_the_stream(client: Client, generator: Generator) -> None:
    """The generator notices the end of its reader."""
    batches = client.failures("endless", resume_token="3")
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert generator.abandoned.wait(TIMEOUT_S)


def test_error_of_a_failed_run(client: Client) -> None:
    """The error of the run is raised with its reason."""
    with pytest.raises(NotReady, match="mush") as caught:
        list(client.failures("refused"))
    assert caught.value.reason == "VAE_TOO_COARSE"


def test_latent_space(client: Client) -> None:
    """Encode, decode and interpolate take and return arrays."""
    space = client.latent_space("first")
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    mu, sigma = space.encode(images)
    np.testing.assert_allclose(mu, images.reshape(3, 4) / 2)
    np.testing.assert_allclose(sigma, images.reshape(3, 4))
    np.testing.assert_array_equal(space.decode(mu), images)
    walk = space.interpolate(images[0], images[0] + 8, frames=5)
    np.testing.assert_array_equal(walk.images[2], images[0] + 4)
    assert (walk.images.shape, walk.predicted_labels) == ((5, 2, 2, 1), (0, 1, 2, 3, 4))
