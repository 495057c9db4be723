"""Requests and answers of the Open Inference Protocol, split into one observation an image.

The messages are whatever the program's own stubs are made of: their fields are read by name, so that no second copy of
the protocol is loaded beside the first.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from defuse.guard_outputs import OUTPUTS
from defuse.hooks.buffer import OBSERVATIONS
from defuse.hooks.drops import Dropped
from defuse.hooks.observation import Observation

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
_SCORES = "FP32"
_SHARED = "shared_memory_region"
# Field of the contents and layout in memory of what is not sent raw.
_TYPED = {
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


# Made on the caller's thread, where a frozen one would take twice the time.
@dataclass(kw_only=True, slots=True)
class Asked:
    """A request, as it was when it was made: its caller may fill the same message anew."""

    id: str
    model: str
    # Images.
    count: int
    # Class of the message, and the message itself; None where it is not sampled.
    kind: Any
    content: bytes | None


# Made on the caller's thread, too.
@dataclass(slots=True)
class Exchange:
    """A sampled request and its answer, not looked into yet."""

    asked: Asked
    content: bytes
    answer_kind: Any
    answer: bytes
    time_s: float
    kind: str = OBSERVATIONS

    @classmethod
    def of(cls, asked: Asked, content: bytes, response: Any) -> "Exchange":
        return cls(asked, content, type(response), response.SerializeToString(), time.time())

    @property
    def count(self) -> int:
        return self.asked.count

    @property
    def size(self) -> int:
        return len(self.content) + len(self.answer)

    def observations(self) -> list[Observation]:
        """Return what was asked and answered of each image; raise Dropped where images cannot be told apart."""
        request = self.asked.kind.FromString(self.content)
        response = self.answer_kind.FromString(self.answer)
        _check(request, response)
        tensor, count = request.inputs[0], self.count
        images = _rows(_content(tensor, request.raw_input_contents, 0), tensor, count)
        scores = _scores(response, count)
        time_ = datetime.fromtimestamp(self.time_s, UTC)
        return [
            Observation(
                model=self.asked.model,
                id=self.asked.id if count == 1 else f"{self.asked.id}-{row}",
                time=time_,
                version=response.model_version,
                input=images[row],
                shape=tuple(tensor.shape[1:]),
                datatype=tensor.datatype,
                scores=scores[row],
            )
            for row in range(count)
        ]


def images_in(request: Any) -> int:
    """Return how many images a request asks about, as far as its first shape says."""
    inputs = request.inputs
    shape = inputs[0].shape if inputs else ()
    return max(0, shape[0]) if shape else 1


def _check(request: Any, response: Any) -> None:
    if _refers_to_memory(request.inputs) or _refers_to_memory(response.outputs):
        raise Dropped("shared_memory", f"tensors of {request.model_name!r} are in shared memory, not in the request")
    if len(request.inputs) != 1:
        raise Dropped("inputs", f"a request to {request.model_name!r} has {len(request.inputs)} inputs, not one image")


def _refers_to_memory(tensors: Any) -> bool:
    return any([_SHARED in tensor.parameters for tensor in tensors])  # noqa: C419  # a generator takes twice the time


def _content(tensor: Any, raw: Sequence[bytes], index: int) -> bytes:
    """Return the content of a tensor, row-major in its own datatype."""
    if tensor.datatype == "BYTES":
        raise Dropped("datatype", f"{tensor.name!r} is of BYTES, whose images have no common size")
    if raw:
        return raw[index]
    if tensor.datatype not in _TYPED:
        raise Dropped("datatype", f"{tensor.name!r} is of {tensor.datatype}, and is not sent raw")
    field, layout = _TYPED[tensor.datatype]
    return np.array(getattr(tensor.contents, field), layout).tobytes()


def _rows(content: bytes, tensor: Any, count: int) -> list[bytes]:
    """Cut a content into as many equal pieces as there are images."""
    if not tensor.shape or tensor.shape[0] != count or len(content) % count:
        raise Dropped(
            "shape",
            f"{tensor.name!r} of shape {list(tensor.shape)} with {len(content)} bytes is no batch of {count} images",
        )
    size = len(content) // count
    return [content[begin : begin + size] for begin in range(0, count * size, size)] if size else [b""] * count


def _scores(response: Any, count: int) -> list[tuple[float, ...]]:
    """Return the rows of the first output of real numbers that is no guard's; empty ones where there is none."""
    for index, tensor in enumerate(response.outputs):
        if tensor.datatype == _SCORES and tensor.name not in OUTPUTS:
            rows = _rows(_content(tensor, response.raw_output_contents, index), tensor, count)
            return [tuple(np.frombuffer(row, "<f4").tolist()) for row in rows]
    return [()] * count
