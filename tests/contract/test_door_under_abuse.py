"""Abuse of the public API: each case gets a clear status, and the next caller is served."""

import dataclasses
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest
import tritonclient.grpc as triton
from defuse.v1 import gateway_service_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from tests.conftest import eventually
from tests.contract.conftest import Gateway
from tests.restartable_triton import SHAPE, Served, asked, images

MODEL = "tiny"
INFER = "/inference.GRPCInferenceService/ModelInfer"
GATEWAY = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]
# Statuses that say that the fault is ours, or nothing at all.
SPEECHLESS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}
DEADLINE_S = 20.0
_FUZZED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
_WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["runs/a", "models/tiny", "runs/a/regions/r1", "datasets/d", "runs/../a", "a" * 70, "file:///etc"]),
    st.text(alphabet="0123456789abcdef", min_size=64, max_size=64),
)
# Names that are well-formed, so that more than their form is looked at.
_NAMES = {
    "run": st.just("runs/a"),
    "before": st.just("runs/a"),
    "after": st.just("runs/a"),
    "model": st.just("models/tiny"),
    "dataset": st.just("datasets/d"),
    "region": st.just("runs/a/regions/r1"),
    "name": st.sampled_from(["runs/a", "models/tiny", "datasets/d", "runs/a/regions/r1", "runs/a/corrections/c1"]),
}
_NUMBERS: dict[int, Any] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 9),
}


@st.composite
def messages(draw: Any, descriptor: Any, depth: int = 3) -> Message:
    """Draw a message of a type, with fields left out, repeated, nested and out of all bounds."""
    message: Any = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if (field.message_type and depth == 0) or not draw(st.booleans()):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            continue
        count = draw(st.integers(0, 3)) if field.is_repeated else 1
        for _ in range(count):
            _fill(message, field, draw, depth)
    return message


def _fill(message: Any, field: FieldDescriptor, draw: Any, depth: int) -> None:
    if field.message_type:
        value = draw(messages(field.message_type, depth - 1))
        (getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)).CopyFrom(value)
        return
    if field.type == FieldDescriptor.TYPE_BYTES:
        value = draw(st.binary(max_size=50))
    else:
        words = st.one_of(_NAMES.get(field.name, _WORDS), _WORDS)
        value = draw(_NUMBERS.get(field.cpp_type, words))
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


@pytest.fixture(scope="module")
def channel(door: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(door) as channel:
        yield channel


def outcome(channel: grpc.Channel, path: str, request: bytes, *, streams: tuple[bool, bool]) -> grpc.RpcError | None:
    """Make a call with these bytes; return how it was refused, or nothing."""
    kind = "_".join("stream" if one else "unary" for one in streams)
    sent: Any = iter([request]) if streams[0] else request
    call: Any = getattr(channel, kind)(path)
    try:
        answer = call(sent, timeout=DEADLINE_S)
        if streams[1]:
            list(answer)
    except grpc.RpcError as error:
        return error
    return None


def assert_clear(error: Any) -> None:
    """The status says who must act, in words of ours or of Triton, and shows no inside of the server."""
    assert error.code() not in SPEECHLESS, (error.code(), error.details())
    assert error.details()
    assert "Traceback" not in error.details()
    assert not re.search(r'File "|\.py\b', error.details())


@pytest.mark.parametrize("method", list(GATEWAY.methods), ids=lambda method: method.name)
def test_random_requests(channel: grpc.Channel, method: MethodDescriptor) -> None:
    """Any combination of fields gets an answer, or a status with a message."""

    @_FUZZED
    @given(request=messages(method.input_type))
    def ask(request: Message) -> None:
        streams = (method.client_streaming, method.server_streaming)
        path = f"/{GATEWAY.full_name}/{method.name}"
        if error := outcome(channel, path, request.SerializeToString(), streams=streams):
            assert_clear(error)

    ask()


@_FUZZED
@given(request=messages(service_pb2.ModelInferRequest.DESCRIPTOR), known=st.booleans(), stream=st.booleans())
def test_random_requests_for_inference(channel: grpc.Channel, request: Any, known: bool, stream: bool) -> None:
    """Tensors of any kind reach Triton, whose words reach the caller."""
    if known:
        request.model_name, request.model_version = MODEL, ""
    path = "/inference.GRPCInferenceService/ModelStreamInfer" if stream else INFER
    error = outcome(channel, path, request.SerializeToString(), streams=(stream, stream))
    if error:
        assert "Traceback" not in (error.details() or "")  # type: ignore[attr-defined]
        assert error.code() is not grpc.StatusCode.UNKNOWN  # type: ignore[attr-defined]


@_FUZZED
@given(request=st.binary(max_size=200))
def test_random_bytes(channel: grpc.Channel, request: bytes) -> None:
    """An invalid protobuf ends its own call only."""
    error = outcome(channel, INFER, request, streams=(False, False))
    assert error is None or "Traceback" not in (error.details() or "")  # type: ignore[attr-defined]


def test_the_door_still_stands(gateway: Gateway, served: Served) -> None:
    """After all that: the same process answers, and its log has no defect in it."""
    with closing(triton.InferenceServerClient(gateway.address)) as client:
        assert client.infer(MODEL, asked(images(1), served.model.input_name)).as_numpy(served.model.output_name).any()
    assert "call_failed" not in gateway.log.read_text()


@pytest.mark.parametrize("fault", ["unknown model", "dtype", "shape", "short", "long", "no input", "two inputs"])
def test_tensors_that_do_not_fit(door: str, served: Served, fault: str) -> None:
    """Each is refused by name, as Triton itself refuses it, and the next request is answered."""
    name, right = served.model.input_name, images(1)
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name=name, datatype="FP32", shape=right.shape)
    request.raw_input_contents.append(right.tobytes())
    match fault:
        case "unknown model":
            request.model_name = "nobody"
        case "dtype":
            tensor.datatype = "INT64"
        case "shape":
            tensor.shape[:] = [1, *SHAPE[:2], 3]
        case "short":
            request.raw_input_contents[0] = right.tobytes()[:-4]
        case "long":
            request.raw_input_contents[0] = right.tobytes() + b"1234"
        case "no input":
            del request.inputs[:]
            del request.raw_input_contents[:]
        case "two inputs":
            request.inputs.add(name="another", datatype="FP32", shape=[1])
            request.raw_input_contents.append(b"1234")
    errors = []
    for address in (door, served.address):
        with grpc.insecure_channel(address) as one:
            errors.append(outcome(one, INFER, request.SerializeToString(), streams=(False, False)))
    through, direct = errors
    assert through is not None
    assert direct is not None
    assert through.code() is direct.code()  # type: ignore[attr-defined]
    assert through.details() == direct.details()  # type: ignore[attr-defined]
    with closing(triton.InferenceServerClient(door)) as client:
        client.infer(MODEL, asked(right, name))


def test_a_slow_reader_of_a_stream(gateway: Gateway, served: Served) -> None:
    """A caller that sends requests and reads no answer is held back; the gateway does not buffer answers."""
    data = asked_for(images(256), served.model.input_name)
    sent = [0]

    def endlessly() -> Iterator[bytes]:
        for sent[0] in range(2000):
            yield data

    before = gateway.memory_bytes()
    with grpc.insecure_channel(gateway.address) as channel:
        stream: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(endlessly())
        held: list[int] = []

        def stands_still() -> bool:
            held.append(sent[0])
            time.sleep(0.2)
            return len(held) > 5 and held[-1] == held[-5] > 0

        eventually(stands_still)
        assert gateway.memory_bytes() - before < 200 * 2**20
        stream.cancel()
    with closing(triton.InferenceServerClient(gateway.address)) as client:
        client.infer(MODEL, asked(images(1), served.model.input_name))


def test_an_independent_load_generator(door: str, served: Served) -> None:
    """Another implementation of HTTP/2, with gRPC's frames written by hand, is served by the letter of the protocol.

    Fifty small requests, which fit the window of one connection, are under way on it; each gets its own answer.
    """
    batches = [images(1, seed=seed) for seed in range(50)]
    answers = posted(door, INFER, [asked_for(batch, served.model.input_name) for batch in batches])
    with closing(triton.InferenceServerClient(served.address)) as direct:
        for batch, answer in zip(batches, answers, strict=True):
            assert answer.headers[b":status"] == b"200"
            assert answer.headers[b"content-type"].startswith(b"application/grpc")
            assert answer.trailers[b"grpc-status"] == b"0"
            compressed, size = struct.unpack(">BI", answer.body[:5])
            assert (compressed, size) == (0, len(answer.body) - 5)
            response = service_pb2.ModelInferResponse.FromString(answer.body[5:])
            scores = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(1, -1)
            expected = direct.infer(MODEL, asked(batch, served.model.input_name)).as_numpy(served.model.output_name)
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def asked_for(batch: Any, input_name: str) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name=input_name, datatype="FP32", shape=batch.shape)
    request.raw_input_contents.append(batch.tobytes())
    return request.SerializeToString()


@dataclasses.dataclass
class Answer:
    """The messages of one stream."""

    headers: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    trailers: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    ended: bool = False


def posted(address: str, path: str, messages: Sequence[bytes]) -> list[Answer]:
    """Make unary calls with hyper-h2, all at once on one connection; return what came on each stream."""
    host, port = address.split(":")
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    answers = {1 + 2 * number: Answer() for number in range(len(messages))}
    names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": address}
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as wire:
        connection.initiate_connection()
        for stream, message in zip(answers, messages, strict=True):
            connection.send_headers(stream, [*names.items(), ("content-type", "application/grpc"), ("te", "trailers")])
            connection.send_data(stream, struct.pack(">BI", 0, len(message)) + message, end_stream=True)
        while not all(answer.ended for answer in answers.values()):
            wire.sendall(connection.data_to_send())
            for event in connection.receive_data(wire.recv(65536)):
                take(event, answers, connection)
    return list(answers.values())


def take(event: Any, answers: Mapping[int, Answer], connection: h2.connection.H2Connection) -> None:
    match event:
        case h2.events.ResponseReceived():
            answers[event.stream_id].headers = dict(event.headers or ())
        case h2.events.DataReceived():
            answers[event.stream_id].body += event.data or b""
            connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
        case h2.events.TrailersReceived():
            answers[event.stream_id].trailers = dict(event.headers or ())
        case h2.events.StreamEnded():
            answers[event.stream_id].ended = True
