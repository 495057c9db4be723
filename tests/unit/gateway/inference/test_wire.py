"""The first fields of a request in its bytes, held against what protobuf itself reads from them."""

import pytest
from defuse.errors import InvalidInput
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.service_pb2 import ModelInferRequest

from services.gateway.inference.routing import read_target, with_target

WORDS = st.text(max_size=300)
LONG = "é" * 9000


def asked(model: str = "tiny", version: str = "", id_: str = "", raw: bytes = b"\x0a\x04four") -> ModelInferRequest:
    """Return a request with every field that comes after the first ones, and pixels that look like one of these."""
    request = ModelInferRequest(
        model_name=model,
        model_version=version,
        id=id_,
        inputs=[{"name": "image", "datatype": "UINT8", "shape": [1, len(raw)]}],
        outputs=[{"name": "scores"}],
        raw_input_contents=[raw],
    )
    request.parameters["priority"].int64_param = 7
    return request


@given(model=WORDS, version=WORDS, id_=WORDS)
def test_who_is_asked_is_read(model: str, version: str, id_: str) -> None:
    """Any names, empty ones too, are read as protobuf reads them, and the rest begins behind them."""
    request = asked(model, version, id_).SerializeToString()
    target = read_target(request)
    assert (target.model, target.version, target.id) == (model, version, id_)
    assert request[target.end :] == asked("", "", "").SerializeToString()


@given(model=WORDS, version=WORDS, id_=WORDS, other_model=WORDS, other_version=WORDS, raw=st.binary())
def test_only_the_target_is_replaced(
    model: str, version: str, id_: str, other_model: str, other_version: str, raw: bytes
) -> None:
    """Protobuf finds the new model and version, and everything else, the tensors' bytes too, as it was."""
    request = asked(model, version, id_, raw).SerializeToString()
    changed = with_target(request, read_target(request), model=other_model, version=other_version)
    assert ModelInferRequest.FromString(changed) == asked(other_model, other_version, id_, raw)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 70000])
def test_names_of_every_length(size: int) -> None:
    """Names whose length takes one byte, two or three are written as protobuf writes them."""
    name = "n" * size
    request = asked(id_=LONG).SerializeToString()
    changed = with_target(request, read_target(request), model=name, version=name)
    assert changed == asked(name, name, LONG).SerializeToString()
    assert read_target(changed).model == name


@given(model=WORDS, version=WORDS, id_=WORDS)
def test_a_request_that_stays_is_not_copied(model: str, version: str, id_: str) -> None:
    """With the target that it has, a request is the same object."""
    request = asked(model, version, id_).SerializeToString()
    assert with_target(request, read_target(request), model=model, version=version) is request


def test_a_later_value_counts() -> None:
    """Of a field that comes twice the last one is read, as by protobuf; when it is replaced none of them is left."""
    request = b"".join(ModelInferRequest(model_name=name).SerializeToString() for name in ("first", "second"))
    target = read_target(request)
    assert target.model == ModelInferRequest.FromString(request).model_name == "second"
    assert with_target(request, target, model="third", version="") == asked_alone("third")


def test_an_empty_request_asks_for_nothing() -> None:
    """No bytes are a request without a name, which Triton refuses."""
    target = read_target(b"")
    assert (target.model, target.version, target.id, target.end) == ("", "", "", 0)
    assert with_target(b"", target, model="tiny", version="2") == asked_alone("tiny", "2")


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (b"\x0a", "ends within a length"),
        (b"\x0a\x80", "ends within a length"),
        (b"\x0a\x05tiny", "longer than the request"),
        (b"\x0a\x04tiny\x12\xff\xff\x7f1", "longer than the request"),
        (b"\x0a\x02\xc3\x28", "not UTF-8"),
    ],
)
def test_what_is_no_request(request_: bytes, why: str) -> None:
    """Bytes that protobuf would refuse are refused with a sentence that says why."""
    with pytest.raises(InvalidInput, match=f"no ModelInferRequest: .*{why}") as caught:
        read_target(request_)
    assert caught.value.reason == "MALFORMED_REQUEST"


def test_a_length_that_never_ends() -> None:
    """A length has ten bytes at most, as protobuf has it: a longer one is refused without reading on."""
    request = b"\x0a\x84" + 9 * b"\x80" + b"\x00tiny"
    with pytest.raises(DecodeError):
        ModelInferRequest.FromString(request)
    with pytest.raises(InvalidInput):
        read_target(request)


@given(data=st.binary(max_size=64).map(lambda data: b"\x0a" + data))
def test_no_bytes_break_it(data: bytes) -> None:
    """Any bytes are read within their bounds or refused; nothing else is raised."""
    try:
        target = read_target(data)
    except InvalidInput:
        return
    assert 0 < target.end <= len(data)


def asked_alone(model: str, version: str = "") -> bytes:
    return ModelInferRequest(model_name=model, model_version=version).SerializeToString()
