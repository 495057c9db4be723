"""Routing of inference requests to champions and challengers.

Model and version are read and replaced in the serialized bytes. Known encoders write the fields of
`inference.ModelInferRequest` in the order of their numbers. In any order, a later value of a singular field replaces an
earlier one.
"""

import asyncio
import random
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from defuse import names
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import trial_pb2

from services.gateway.trials.trials import LEASE_S, REFRESH_S, Trials
from services.runtime.worker import retry_while_redis_is_away

# Tags of the routed fields: number << 3 | 2, for length-delimited bytes.
_MODEL_NAME, _MODEL_VERSION, _ID = 0x0A, 0x12, 0x1A
# Tags of the fields with requested outputs and tensor contents, and the wire type of bytes.
_OUTPUTS, _RAW_CONTENTS, _BYTES = 0x32, 0x3A, 2
_SHARED = b"shared_memory_region"
# Up to this size in bytes, scanning a whole request is faster than skipping its contents.
_SMALL = 16_384
_MORE = 0x80
# A varint has at most ten bytes of seven bits each.
_LONGEST_BITS = 70


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model and version that a request names.

    `end` is the offset of the request's other fields.
    """

    model: str
    version: str
    id: str
    end: int


def read_target(request: bytes) -> Target:
    """Return the target of a serialized ModelInferRequest.

    Raises InvalidInput for invalid bytes.
    """
    values = {_MODEL_NAME: b"", _MODEL_VERSION: b"", _ID: b""}
    position = 0
    while position < len(request) and (tag := request[position]) in values:
        length, begin = _varint(request, position + 1)
        position = begin + length
        if position > len(request):
            raise _malformed("a field is longer than the request")
        values[tag] = request[begin:position]
    try:
        model, version, id_ = (values[tag].decode() for tag in (_MODEL_NAME, _MODEL_VERSION, _ID))
    except UnicodeDecodeError as error:
        raise _malformed("a name is not UTF-8") from error
    return Target(model=model, version=version, id=id_, end=position)


def with_target(request: bytes, target: Target, *, model: str, version: str) -> bytes:
    """Return the request with another model and version, otherwise unchanged.

    Returns the same object when nothing changes.
    """
    if (model, version) == (target.model, target.version):
        return request
    head = b"".join(
        _field(tag, value) for tag, value in ((_MODEL_NAME, model), (_MODEL_VERSION, version), (_ID, target.id))
    )
    return b"".join((head, memoryview(request)[target.end :]))


def may_refer_to_memory(request: bytes) -> bool:
    """Return whether tensors of a serialized ModelInferRequest may be in shared memory.

    The contents of tensors are skipped.
    """
    if len(request) < _SMALL and _SHARED not in request:
        return False
    fields = _top_level_fields(request)
    if fields is None:
        return _SHARED in request  # no field of today's: look everywhere
    return any(tag != _RAW_CONTENTS and request.find(_SHARED, begin, end) >= 0 for tag, begin, end in fields)


def names_outputs(request: bytes) -> bool:
    """Return whether a serialized ModelInferRequest names the outputs that it requests.

    A request that names none gets all outputs.
    """
    return any(tag == _OUTPUTS for tag, _, _ in _top_level_fields(request) or ())


def _top_level_fields(request: bytes) -> list[tuple[int, int, int]] | None:
    """Return tag, begin and end of each field.

    Returns None when a field has a type or number that the message does not use today.
    """
    found, position = [], 0
    while position < len(request):
        tag, begin = request[position], position + 1
        if tag & 7 != _BYTES or tag & _MORE:
            return None
        length, begin = _varint(request, begin)
        position = begin + length
        found.append((tag, begin, position))
    return found


def _field(tag: int, value: str) -> bytes:
    data = value.encode()
    if not data:
        return b""
    length, rest = bytearray(), len(data)
    while rest >= _MORE:
        length.append(rest & ~_MORE & 0xFF | _MORE)
        rest >>= 7
    length.append(rest)
    return bytes([tag]) + bytes(length) + data


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a length, and the position at which its content begins."""
    value = shift = 0
    while position < len(data) and shift < _LONGEST_BITS:
        byte = data[position]
        value |= (byte & ~_MORE) << shift
        position, shift = position + 1, shift + 7
        if byte < _MORE:
            return value, position
    raise _malformed("it ends within a length, or has one of more than ten bytes")


def _malformed(why: str) -> InvalidInput:
    return InvalidInput(f"the request is no ModelInferRequest: {why}", reason="MALFORMED_REQUEST")


CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True, kw_only=True)
class Route:
    """The model and version that a request goes to.

    Without a version Triton uses the champion, the newest version that is loaded.
    """

    model: str
    version: str = ""
    # The trial that counts the request, and whether the request was drawn for it.
    trial: trial_pb2.Trial | None = None
    drawn: bool = False


class RoutingTable:
    """The trials under way, as far as this gateway has read them.

    `Trials` is the only writer of the underlying records.
    """

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._running: dict[str, trial_pb2.Trial] = {}
        self._known_at = 0.0

    async def run(self) -> None:
        """Refresh the table until the task is cancelled."""
        while True:
            asked = time.monotonic()
            self.show(await retry_while_redis_is_away(self._trials.running), since=asked)
            await asyncio.sleep(REFRESH_S)

    def show(self, running: Iterable[trial_pb2.Trial], *, since: float | None = None) -> None:
        """Replace the trials under way by those at a time, default now."""
        self._known_at = time.monotonic() if since is None else since
        self._running = {names.last(names.parent(trial.name)): trial for trial in running}

    def route(self, target: Target) -> Route:
        """Return the route of an inference request; raise NotFound as `named` does."""
        trial = self._trial(target.model)
        if target.version or trial is None:
            return self.named(target)
        return Route(model=target.model, trial=trial, drawn=_draw(target.id) < trial.share)

    def request_as_named(self, request: bytes) -> bytes:
        """Return a request with model and version resolved.

        Model and version are the first fields of every request for inference or about a model. Raises NotFound as
        `named` does.
        """
        target = read_target(request)
        meant = self.named(target)
        return with_target(request, target, model=meant.model, version=meant.version)

    def named(self, target: Target) -> Route:
        """Return the route of a model and version, without a trial.

        Raises NotFound for the challenger of a model without a trial.
        """
        trial = self._trial(target.model)
        if target.version == CHALLENGER:
            if trial is None:
                raise NotFound(
                    f"model {target.model!r} has no challenger: no trial is under way; ask for {CHAMPION!r} or leave "
                    "the version out",
                    reason="NO_CHALLENGER",
                )
            model, version = challenger_of(trial)
            return Route(model=model, version=version)
        return Route(model=target.model, version="" if target.version == CHAMPION else target.version)

    def _trial(self, model_id: str) -> trial_pb2.Trial | None:
        """Return the trial of a model, or None without one.

        Also returns None when this gateway's view is stale, as the trial may have ended.
        """
        return self._running.get(model_id) if time.monotonic() - self._known_at < LEASE_S else None


def challenger_of(trial: trial_pb2.Trial) -> tuple[str, str]:
    """Return the name and version under which Triton serves a trial's challenger."""
    return trial.candidate, str(trial.candidate_version)


def _draw(request_id: str) -> float:
    """Return a number in [0, 1) that depends on the id alone.

    A retry therefore takes the same route. A request without an id gets a random number.
    """
    return zlib.crc32(request_id.encode()) / 2**32 if request_id else random.random()  # noqa: S311  # no secret
