"""Observations of single images, logged or captured from requests.

Requests and responses of the Open Inference Protocol are read by field names, whatever module their classes come from,
because a second copy of the protocol would be a descriptor conflict.
"""

import hashlib
import itertools
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from defuse.errors import InvalidInput
from defuse.guard_outputs import OUTPUTS
from defuse.hooks.buffer import OBSERVATIONS, TRUTHS, Dropped
from defuse.v1 import monitor_pb2

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
# The model's input as bytes or as real numbers, or a stored picture (h, w, c) uint8.
LoggedImage: TypeAlias = bytes | npt.NDArray[Any] | None
_MAX_BYTES = 1024 * 1024 - 16 * 1024
_MAX_ID_LENGTH = 128
_OVERHEAD_BYTES = 200
_HASHES = 1 << 64
_SCORES_DATATYPE = "FP32"
_SHARED_MEMORY = "shared_memory_region"
# Content field and memory layout of tensors that are not sent raw, by datatype.
_TYPED_CONTENTS = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
}


class Sampler:
    """Samples a share of all ids by their hashes.

    Every process samples the same ids. Raises InvalidInput for a share outside of [0, 1].
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise InvalidInput(f"share is {share}; give the share of the requests to report, in [0, 1]")
        self._below = round(share * _HASHES)

    def samples(self, request_id: str) -> bool:
        """Return whether a request is sampled."""
        if self._below == _HASHES:
            return True
        digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._below

    def may_have_sampled(self, observation_id: str) -> bool:
        """Return whether an observation or its request is sampled.

        The request of the row `{id}-{row}` has the id `{id}`.
        """
        request_id, _, row = observation_id.rpartition("-")
        return self.samples(observation_id) or (row.isdecimal() and self.samples(request_id))


class IdGenerator:
    """Generates ids that are unique across processes."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex[:16]
        self._count = itertools.count()

    def next_id(self) -> str:
        """Return a new id."""
        return f"{self._prefix}.{next(self._count)}"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """An image with the response of a classifier.

    `redact` receives it, and may return a changed copy (`dataclasses.replace`).
    """

    model: str
    id: str
    time: datetime
    version: str = ""
    # The classifier's input for one image, or a stored picture; at most one is set.
    input: bytes = field(default=b"", repr=False)
    picture: bytes = field(default=b"", repr=False)
    # Of the image without the batch dimension; the datatype is that of the Open Inference Protocol.
    shape: tuple[int, ...] = ()
    datatype: str = ""
    scores: tuple[float, ...] = ()

    def to_proto(self) -> monitor_pb2.Observation:
        """Return the message of the observation.

        Raises Dropped for an invalid observation, because the gateway would refuse its whole batch.
        """
        if not (0 < len(self.id) <= _MAX_ID_LENGTH and self.id.isprintable()):
            raise Dropped(
                "bad_id", f"id {self.id[:_MAX_ID_LENGTH]!r} must have 1 to {_MAX_ID_LENGTH} printable characters"
            )
        if not all(map(math.isfinite, self.scores)):
            raise Dropped("bad_scores", f"scores of {self.id!r} are not finite")
        if not (self.input or self.picture or self.scores):
            raise Dropped("empty", f"{self.id!r} has neither an image nor scores")
        message = monitor_pb2.Observation(id=self.id, version=self.version, scores=self.scores)
        # Ten times as fast as FromDatetime, which takes the calendar apart.
        message.time.FromMicroseconds(round(self.time.timestamp() * 1e6))
        if self.input:
            message.input = self.input
        elif self.picture:
            message.picture = self.picture
        if (size := message.ByteSize()) > _MAX_BYTES:
            raise Dropped("too_large", f"{self.id!r} has {size} bytes; the limit of a message is {_MAX_BYTES}")
        return message


@dataclass(frozen=True, slots=True)
class LoggedObservation:
    """An observation from `Monitor.log`, to be buffered."""

    observation: Observation
    kind: str = OBSERVATIONS

    @property
    def count(self) -> int:
        return 1

    @property
    def size(self) -> int:
        observation = self.observation
        return len(observation.input) + len(observation.picture) + 8 * len(observation.scores) + _OVERHEAD_BYTES

    def observations(self) -> list[Observation]:
        return [self.observation]


@dataclass(frozen=True, slots=True)
class TruthLabel:
    """The true class name of an observation, to be buffered."""

    model: str
    id: str
    label: str
    kind: str = TRUTHS

    @property
    def count(self) -> int:
        return 1

    @property
    def size(self) -> int:
        return len(self.id) + len(self.label) + _OVERHEAD_BYTES


def image_fields(image: LoggedImage) -> dict[str, Any]:
    """Return a copy of an image as fields of an observation.

    Raises Dropped for arrays that are neither uint8 nor real.
    """
    if image is None:
        return {}
    if isinstance(image, bytes):
        return {"input": image}
    array = np.asarray(image)
    if array.dtype == np.uint8:
        return {"picture": array.tobytes(), "shape": array.shape, "datatype": "UINT8"}
    if np.issubdtype(array.dtype, np.floating):
        return {"input": array.astype("<f4").tobytes(), "shape": array.shape, "datatype": "FP32"}
    raise Dropped(
        "bad_image", f"an image of {array.dtype} is neither uint8 nor real numbers; convert it, or pass bytes"
    )


# Created on the caller's thread, where a frozen dataclass would take twice the time.
@dataclass(kw_only=True, slots=True)
class CapturedRequest:
    """A copy of a request, whose message the caller may reuse.

    `message_class` is the class of the message, and `content` its serialization, or None for a request that is not
    sampled.
    """

    id: str
    model: str
    # Images.
    count: int
    message_class: Any
    content: bytes | None


# Created on the caller's thread, too.
@dataclass(slots=True)
class CapturedInference:
    """A sampled request and its response, serialized for the buffer."""

    request: CapturedRequest
    request_content: bytes
    response_class: Any
    response_content: bytes
    time_s: float
    kind: str = OBSERVATIONS

    @classmethod
    def of(cls, request: CapturedRequest, content: bytes, response: Any) -> "CapturedInference":
        """Return the inference of a request with this content and its response."""
        return cls(request, content, type(response), response.SerializeToString(), time.time())

    @property
    def count(self) -> int:
        return self.request.count

    @property
    def size(self) -> int:
        return len(self.request_content) + len(self.response_content)

    def observations(self) -> list[Observation]:
        """Return one observation per image.

        Raises Dropped for tensors that cannot be split into images.
        """
        request = self.request.message_class.FromString(self.request_content)
        response = self.response_class.FromString(self.response_content)
        _check_tensors(request, response)
        tensor, count = request.inputs[0], self.count
        images = _split_rows(_tensor_content(tensor, request.raw_input_contents, 0), tensor, count)
        scores = _scores(response, count)
        time_ = datetime.fromtimestamp(self.time_s, UTC)
        return [
            Observation(
                model=self.request.model,
                id=self.request.id if count == 1 else f"{self.request.id}-{row}",
                time=time_,
                version=response.model_version,
                input=images[row],
                shape=tuple(tensor.shape[1:]),
                datatype=tensor.datatype,
                scores=scores[row],
            )
            for row in range(count)
        ]


def count_images(request: Any) -> int:
    """Return a request's batch size, by its first input."""
    inputs = request.inputs
    shape = inputs[0].shape if inputs else ()
    return max(0, shape[0]) if shape else 1


def _check_tensors(request: Any, response: Any) -> None:
    if _in_shared_memory(request.inputs) or _in_shared_memory(response.outputs):
        raise Dropped("shared_memory", f"tensors of {request.model_name!r} are in shared memory, not in the request")
    if len(request.inputs) != 1:
        raise Dropped("inputs", f"a request to {request.model_name!r} has {len(request.inputs)} inputs, not one image")


def _in_shared_memory(tensors: Any) -> bool:
    return any([_SHARED_MEMORY in tensor.parameters for tensor in tensors])  # noqa: C419  # a generator is twice as slow


def _tensor_content(tensor: Any, raw: Sequence[bytes], index: int) -> bytes:
    """Return the content of a tensor, row-major in its datatype."""
    if tensor.datatype == "BYTES":
        raise Dropped("datatype", f"{tensor.name!r} has datatype BYTES; its images differ in size")
    if raw:
        return raw[index]
    if tensor.datatype not in _TYPED_CONTENTS:
        raise Dropped("datatype", f"{tensor.name!r} has datatype {tensor.datatype} without raw contents")
    contents, layout = _TYPED_CONTENTS[tensor.datatype]
    return np.array(getattr(tensor.contents, contents), layout).tobytes()


def _split_rows(content: bytes, tensor: Any, count: int) -> list[bytes]:
    """Split the content of a batch into images."""
    if not tensor.shape or tensor.shape[0] != count or len(content) % count:
        raise Dropped(
            "shape",
            f"{tensor.name!r} of shape {list(tensor.shape)} with {len(content)} bytes is not a batch of {count} images",
        )
    size = len(content) // count
    return [content[begin : begin + size] for begin in range(0, count * size, size)] if size else [b""] * count


def _scores(response: Any, count: int) -> list[tuple[float, ...]]:
    """Return the scores of each image, empty if there are none.

    Scores are the first FP32 output that is not a guard's.
    """
    for index, tensor in enumerate(response.outputs):
        if tensor.datatype == _SCORES_DATATYPE and tensor.name not in OUTPUTS:
            rows = _split_rows(_tensor_content(tensor, response.raw_output_contents, index), tensor, count)
            return [tuple(np.frombuffer(row, "<f4").tolist()) for row in rows]
    return [()] * count
