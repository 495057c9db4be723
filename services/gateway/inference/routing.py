"""Routing of inference requests: model and version are read from the bytes, and replaced there."""

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

# Tags of the fields that say what is asked: number << 3 | 2, for bytes with their length before them.
_MODEL_NAME, _MODEL_VERSION, _ID = 0x0A, 0x12, 0x1A
# Tags of the fields with the outputs that are asked for and with the tensors' contents, and the wire type of bytes.
_OUTPUTS, _RAW_CONTENTS, _BYTES = 0x32, 0x3A, 2
_SHARED = b"shared_memory_region"
# Bytes up to which it is quicker to look at all of a request than to pass over its contents.
_SMALL = 16_384
_MORE = 0x80
# A length has ten bytes at most, of seven bits each.
_LONGEST_BITS = 70


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which model and version a request asks for; `end` is where its other fields begin."""

    model: str
    version: str
    id: str
    end: int


def read_target(request: bytes) -> Target:
    """Return the target of a serialized ModelInferRequest; raise InvalidInput for bytes that are none."""
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


def retargeted(request: bytes, target: Target, *, model: str, version: str) -> bytes:
    """Return the request with another model and version, all else as it was; itself where both are what they were."""
    if (model, version) == (target.model, target.version):
        return request
    head = b"".join(
        _field(tag, value) for tag, value in ((_MODEL_NAME, model), (_MODEL_VERSION, version), (_ID, target.id))
    )
    return b"".join((head, memoryview(request)[target.end :]))


def may_refer_to_memory(request: bytes) -> bool:
    """Say whether tensors of a serialized ModelInferRequest may be in shared memory; their contents are passed over."""
    if len(request) < _SMALL and _SHARED not in request:
        return False
    fields = _top_level_fields(request)
    if fields is None:
        return _SHARED in request  # no field of today's: look everywhere
    return any(tag != _RAW_CONTENTS and request.find(_SHARED, begin, end) >= 0 for tag, begin, end in fields)


def names_outputs(request: bytes) -> bool:
    """Say whether a serialized ModelInferRequest names the outputs that it asks for; without, all are answered."""
    return any(tag == _OUTPUTS for tag, _, _ in _top_level_fields(request) or ())


def _top_level_fields(request: bytes) -> list[tuple[int, int, int]] | None:
    """Return tag, begin and end of each field; None where one is not of the kind that they are today."""
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
    """Return a length and where what it counts begins."""
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
    """Where a request goes. Without a version Triton gives the champion: the newest version that is loaded."""

    model: str
    version: str = ""
    # The trial that the request counts in, and whether it was drawn for it.
    trial: trial_pb2.Trial | None = None
    drawn: bool = False


class RoutingTable:
    """What this gateway knows of trials under way. One writer of them all: `Trials`."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._running: dict[str, trial_pb2.Trial] = {}
        self._known_at = 0.0

    async def run(self) -> None:
        """Keep up with all gateways, for ever."""
        while True:
            asked = time.monotonic()
            self.show(await retry_while_redis_is_away(self._trials.running), since=asked)
            await asyncio.sleep(REFRESH_S)

    def show(self, running: Iterable[trial_pb2.Trial], *, since: float | None = None) -> None:
        """Take what is under way now, or was at a time."""
        self._known_at = time.monotonic() if since is None else since
        self._running = {names.last(names.parent(trial.name)): trial for trial in running}

    def route(self, target: Target) -> Route:
        """Return where a request for inference goes; raise NotFound as `named` does."""
        trial = self._trial(target.model)
        if target.version or trial is None:
            return self.named(target)
        return Route(model=target.model, trial=trial, drawn=_draw(target.id) < trial.share)

    def request_as_named(self, request: bytes) -> bytes:
        """Return a request with what its model and version mean; raise NotFound as `named` does.

        Its first fields are model and version: so it is with all that ask for inference, or about a model.
        """
        target = read_target(request)
        meant = self.named(target)
        return retargeted(request, target, model=meant.model, version=meant.version)

    def named(self, target: Target) -> Route:
        """Return what a model and a version mean; raise NotFound for the challenger of a model that has no trial."""
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
        """Return the trial of a model; none where this gateway lost sight of the others, as it may have ended."""
        return self._running.get(model_id) if time.monotonic() - self._known_at < LEASE_S else None


def challenger_of(trial: trial_pb2.Trial) -> tuple[str, str]:
    """Return name and version under which Triton serves the challenger of a trial."""
    return trial.candidate, str(trial.candidate_version)


def _draw(request_id: str) -> float:
    """Return a number in [0, 1): the same for the same id, so that one asked again goes the same way."""
    return zlib.crc32(request_id.encode()) / 2**32 if request_id else random.random()  # noqa: S311  # no secret
