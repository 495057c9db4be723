"""Which requests are sampled, and ids for those that have none."""

import hashlib
import itertools
import uuid

from defuse.errors import InvalidInput

_HASHES = 1 << 64


class Sampler:
    """Takes a share of all ids; the same id always or never, in every process."""

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise InvalidInput(f"share is {share}; give the part of the requests to report, in [0, 1]")
        self._below = round(share * _HASHES)

    def takes(self, request_id: str) -> bool:
        if self._below == _HASHES:
            return True
        digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._below

    def takes_row(self, observation_id: str) -> bool:
        """Say whether an observation may have been taken: as itself, or as a row `{id}-{row}` of a request."""
        request_id, _, row = observation_id.rpartition("-")
        return self.takes(observation_id) or (row.isdecimal() and self.takes(request_id))


class Numbers:
    """Gives ids that no other process gives, nor this one twice."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex[:16]
        self._count = itertools.count()

    def next_id(self) -> str:
        return f"{self._prefix}.{next(self._count)}"
