"""What became of what a hook saw."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of observations, or of truths: at any time `seen` is the sum of all that follows but `sampled`."""

    seen: int
    not_sampled: int
    # At the gateway.
    stored: int
    # In this process, on their way.
    waiting: int
    # By reason.
    dropped: Mapping[str, int]

    @property
    def sampled(self) -> int:
        return self.seen - self.not_sampled


@dataclass(kw_only=True)
class Tally:
    """Counts as they grow; whoever holds one locks."""

    seen: int = 0
    not_sampled: int = 0
    stored: int = 0
    waiting: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def counts(self) -> Counts:
        return Counts(
            seen=self.seen,
            not_sampled=self.not_sampled,
            stored=self.stored,
            waiting=self.waiting,
            dropped=dict(self.dropped),
        )
