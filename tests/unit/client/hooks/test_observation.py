"""Sampling of ids, and requests split into one observation per image."""

from typing import Any

import numpy as np
import pytest
from defuse.hooks.buffer import Dropped
from defuse.hooks.observation import CapturedInference, CapturedRequest, IdGenerator, Observation, Sampler, count_images
from tritonclient.grpc import service_pb2 as oip

from tests.unit.client.hooks.servers import MODEL, infer_request


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 1.0])
def test_share_of_ids(share: float) -> None:
    """The sampled share of consecutive ids, and of others, is as requested."""
    sampler = Sampler(share)
    for ids in ([f"request-{number}" for number in range(20_000)], [f"{number:032x}" for number in range(20_000)]):
        assert sum(map(sampler.samples, ids)) / len(ids) == pytest.approx(share, abs=4 * (0.25 / 20_000) ** 0.5)


def test_decisions_are_fixed() -> None:
    """The decision about an id is a promise.

    All services along a request agree.
    """
    assert [number for number in range(20) if Sampler(0.25).samples(str(number))] == [2, 6, 17, 18]


def test_larger_shares_include_smaller_ones() -> None:
    ids = [str(number) for number in range(1_000)]
    assert {one for one in ids if Sampler(0.1).samples(one)} < {one for one in ids if Sampler(0.2).samples(one)}


def test_rows_follow_their_request() -> None:
    """The truth of a row is sent if its request is sampled."""
    sampler = Sampler(0.5)
    for request_id in map(str, range(200)):
        if sampler.samples(request_id):
            assert sampler.may_have_sampled(f"{request_id}-7")
            assert sampler.may_have_sampled(request_id)
    assert not Sampler(0.0).may_have_sampled("a-7")


def test_generated_ids_are_unique() -> None:
    """No id repeats, within and across generators."""
    one, other = IdGenerator(), IdGenerator()
    found = [numbers.next_id() for _ in range(100) for numbers in (one, other)]
    assert len(set(found)) == 200
    assert max(map(len, found)) < 64


def test_id_of_any_characters() -> None:
    assert Sampler(1.0).samples("\ud800 ü")


SCORES = np.array([[0.5, -1.0], [2.0, 3.0]], "<f4")


def observations(request: oip.ModelInferRequest, response: oip.ModelInferResponse) -> list[Observation]:
    content = request.SerializeToString()
    captured = CapturedRequest(
        id=request.id,
        model=request.model_name,
        count=count_images(request),
        message_class=type(request),
        content=content,
    )
    return CapturedInference.of(captured, content, response).observations()


def make_response(scores: np.ndarray[Any, Any] = SCORES, **fields: Any) -> oip.ModelInferResponse:
    response = oip.ModelInferResponse(model_version="3", raw_output_contents=[scores.tobytes()], **fields)
    response.outputs.add(name="scores", datatype="FP32", shape=scores.shape)
    return response


def typed(datatype: str, shape: list[int], **contents: Any) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=MODEL, id="a")
    request.inputs.add(name="image", datatype=datatype, shape=shape, contents=contents)
    return request


@pytest.mark.parametrize(
    ("datatype", "field", "layout"),
    [
        ("FP32", "fp32_contents", "<f4"),
        ("FP64", "fp64_contents", "<f8"),
        ("UINT8", "uint_contents", "u1"),
        ("UINT16", "uint_contents", "<u2"),
        ("UINT32", "uint_contents", "<u4"),
        ("UINT64", "uint64_contents", "<u8"),
        ("INT8", "int_contents", "i1"),
        ("INT16", "int_contents", "<i2"),
        ("INT32", "int_contents", "<i4"),
        ("INT64", "int64_contents", "<i8"),
        ("BOOL", "bool_contents", "?"),
    ],
)
def test_typed_contents(datatype: str, field: str, layout: str) -> None:
    """They are reported as the bytes of raw contents."""
    values = [0, 1, 1, 0, 1, 1]
    found = observations(typed(datatype, [2, 3], **{field: values}), make_response())
    assert [one.input for one in found] == [np.array(row, layout).tobytes() for row in (values[:3], values[3:])]
    assert [(one.id, one.shape, one.datatype, one.version) for one in found] == [
        ("a-0", (3,), datatype, "3"),
        ("a-1", (3,), datatype, "3"),
    ]


@pytest.mark.parametrize(("datatype", "bytes_each"), [("FP32", 4), ("UINT8", 1), ("FP16", 2), ("BF16", 2)])
def test_raw_contents(datatype: str, bytes_each: int) -> None:
    """Every datatype is split at the ends of images."""
    content = bytes(range(2 * 3 * bytes_each))
    request = oip.ModelInferRequest(model_name=MODEL, id="a", raw_input_contents=[content])
    request.inputs.add(name="image", datatype=datatype, shape=[2, 3])
    assert b"".join(one.input for one in observations(request, make_response())) == content


def test_typed_scores() -> None:
    response = oip.ModelInferResponse(model_version="3")
    response.outputs.add(
        name="scores", datatype="FP32", shape=SCORES.shape, contents={"fp32_contents": SCORES.ravel().tolist()}
    )
    assert [one.scores for one in observations(infer_request("a", 2), response)] == [(0.5, -1.0), (2.0, 3.0)]


def test_scores_among_other_outputs() -> None:
    """Scores are the first FP32 output that is not a guard's.

    Without one there are none.
    """
    response = oip.ModelInferResponse()
    for name, datatype, content in (
        ("label", "INT64", np.zeros((2, 1), "<i8")),
        ("defuse_risk", "FP32", np.zeros((2, 1), "<f4")),
        ("scores", "FP32", SCORES),
        ("embedding", "FP32", np.ones((2, 8), "<f4")),
    ):
        response.outputs.add(name=name, datatype=datatype, shape=content.shape)
        response.raw_output_contents.append(content.tobytes())
    assert [one.scores for one in observations(infer_request("a", 2), response)] == [(0.5, -1.0), (2.0, 3.0)]
    del response.outputs[1:]
    del response.raw_output_contents[1:]
    assert [one.scores for one in observations(infer_request("a", 2), response)] == [(), ()]


def shared(tensor: Any) -> None:
    tensor.parameters["shared_memory_region"].string_param = "theirs"


def with_shared_input() -> oip.ModelInferRequest:
    request = infer_request("a", 2)
    shared(request.inputs[0])
    del request.raw_input_contents[:]
    return request


def with_shared_output() -> oip.ModelInferResponse:
    response = make_response()
    shared(response.outputs[0])
    del response.raw_output_contents[:]
    return response


def with_two_inputs() -> oip.ModelInferRequest:
    request = infer_request("a", 2)
    request.inputs.add(name="mask", datatype="FP32", shape=[2, 1])
    return request


def strings() -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=MODEL, id="a", raw_input_contents=[b"\1\0\0\0a\1\0\0\0b"])
    request.inputs.add(name="image", datatype="BYTES", shape=[2])
    return request


@pytest.mark.parametrize(
    ("request_", "response", "reason"),
    [
        (with_shared_input(), make_response(), "shared_memory"),
        (infer_request("a", 2), with_shared_output(), "shared_memory"),
        (with_two_inputs(), make_response(), "inputs"),
        (oip.ModelInferRequest(model_name=MODEL), make_response(), "inputs"),
        (strings(), make_response(), "datatype"),
        (typed("FP16", [2, 3]), make_response(), "datatype"),
        (typed("FP32", [3, 2], fp32_contents=[0] * 5), make_response(), "shape"),
        (typed("FP32", []), make_response(), "shape"),
        # An image without a batch dimension, in whose place its height stands.
        (typed("FP32", [4, 4], fp32_contents=[0] * 16), make_response(SCORES[0]), "shape"),
    ],
)
def test_unsplittable_requests(request_: oip.ModelInferRequest, response: oip.ModelInferResponse, reason: str) -> None:
    """They are dropped; the message names the tensor or the model."""
    with pytest.raises(Dropped) as caught:
        observations(request_, response)
    assert caught.value.reason == reason
    assert caught.value.message
