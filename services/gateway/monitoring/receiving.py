"""A batch as it comes in over several messages, and what it must hold."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

from services.gateway.monitoring.subjects import Subject
from services.storage.catalog import shape

MOST_OBSERVATIONS = 10_000
MOST_BYTES = 64 << 20
_LONGEST_ID = 128
LONGEST_VERSION = 64
# The end of the year 9999, as far as timestamps go.
_LATEST_S = 253_402_300_799
_VALUE_BYTES = {"FP32": 4, "UINT8": 1}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What somebody reports at once."""

    id: str
    observations: Sequence[monitor_pb2.Observation]


async def received(
    requests: AsyncIterator[pb.ReportRequest], subject_of: Callable[[str], Awaitable[Subject]]
) -> tuple[Subject, Batch]:
    """Return the model that a batch is reported of, and the batch; raise InvalidInput for one that is too large."""
    first = await anext(aiter(requests), None)
    if first is None:
        raise InvalidInput(
            "the report has no messages; send model, batch id and observations", reason="EMPTY_REPORT", field="model"
        )
    batch_id = names.check_id("batch", first.batch_id, field="batch_id")
    subject = await subject_of(names.check(first.model, "models/*", field="model"))
    observations: list[monitor_pb2.Observation] = []
    size = 0
    async for request in _all(first, requests):
        size += request.ByteSize()
        observations.extend(request.observations)
        _check_size(len(observations), size)
    return subject, Batch(id=batch_id, observations=observations)


async def _all(first: pb.ReportRequest, rest: AsyncIterator[pb.ReportRequest]) -> AsyncIterator[pb.ReportRequest]:
    yield first
    async for request in rest:
        yield request


def _check_size(count: int, size: int) -> None:
    if count > MOST_OBSERVATIONS or size > MOST_BYTES:
        raise InvalidInput(
            f"the batch has more than {MOST_OBSERVATIONS} observations or {MOST_BYTES >> 20} MiB, the limits; report "
            "several batches",
            reason="TOO_LARGE",
            field="observations",
        )


def check(observations: Sequence[monitor_pb2.Observation], model: model_pb2.Model) -> None:
    """Raise InvalidInput that names the first observation which cannot be one of the model's."""
    seen: set[str] = set()
    for number, observation in enumerate(observations):
        fault = _fault(observation, model)
        if not fault and observation.id in seen:
            fault = "is there twice in the batch; give each its own id"
        if fault:
            raise InvalidInput(
                f"observation {observation.id[:_LONGEST_ID]!r} {fault}",
                reason="BAD_OBSERVATION",
                field=f"observations[{number}]",
                metadata={"id": observation.id[:_LONGEST_ID]},
            )
        seen.add(observation.id)


def _fault(observation: monitor_pb2.Observation, model: model_pb2.Model) -> str:
    """Return what is wrong with an observation and what to do; nothing where it is right."""
    if not (0 < len(observation.id) <= _LONGEST_ID and observation.id.isprintable()):
        return f"has an id that is refused: use 1 to {_LONGEST_ID} printable characters"
    if not 0 <= observation.time.seconds <= _LATEST_S:
        return f"has a time of {observation.time.seconds} s; give seconds since 1970"
    if len(observation.version) > LONGEST_VERSION:
        return f"has a version of {len(observation.version)} characters; use at most {LONGEST_VERSION}"
    if observation.truth and observation.truth not in model.classes:
        return f"shows {observation.truth!r}, which is no class of {names.last(model.name)!r}; name one of its classes"
    return _image_fault(observation, model) or _scores_fault(observation, model)


def _image_fault(observation: monitor_pb2.Observation, model: model_pb2.Model) -> str:
    kind = observation.WhichOneof("image")
    if kind is None:
        return "" if observation.scores else "has neither an image nor scores; send one of them at least"
    pixels = math.prod(model.image_shape)
    wanted = pixels * (_VALUE_BYTES[model.input_datatype] if kind == "input" else 1)
    if (size := len(getattr(observation, kind))) == wanted:
        return ""
    what = f"inputs ({model.input_datatype})" if kind == "input" else "pictures"
    sizes = shape(model.image_shape)
    return f"has an image of {size} bytes; {what} of {sizes} for {names.last(model.name)!r} have {wanted}"


def _scores_fault(observation: monitor_pb2.Observation, model: model_pb2.Model) -> str:
    if observation.scores and len(observation.scores) != len(model.classes):
        return (
            f"has {len(observation.scores)} scores; {names.last(model.name)!r} answers {len(model.classes)}, "
            "one for each class"
        )
    if not np.isfinite(np.array(observation.scores)).all():
        return "has scores that are no finite numbers; send what the classifier answered"
    return ""
