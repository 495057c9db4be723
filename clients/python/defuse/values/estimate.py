"""A share measured by counting."""

from dataclasses import dataclass, fields
from typing import Self

from defuse.v1 import tensor_pb2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share in [0, 1] measured by counting, with its exact 95 % interval (Clopper and Pearson, 1934)."""

    value: float
    low: float
    high: float
    successes: int
    trials: int

    @classmethod
    def from_proto(cls, message: tensor_pb2.Estimate) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        if not self.trials:
            return "not measured"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.trials})"
