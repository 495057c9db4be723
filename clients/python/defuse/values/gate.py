"""What the gate says of a candidate."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse import names
from defuse.v1 import gate_pb2
from defuse.values.plain import moment, word


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One question of the gate: a figure against a bound.

    `kind` is file, test, class, calibration, region_gain, region, parity or latency; `subject` what it is asked of: a
    class, a region, a batch size.
    """

    kind: str
    subject: str
    figure: float
    # Of the 95 % interval; None where the figure has none.
    low: float | None
    high: float | None
    bound: float
    # Images, or turns of a measurement.
    trials: int
    passed: bool
    # The rule in words.
    rule: str

    @classmethod
    def from_proto(cls, message: gate_pb2.Check) -> Self:
        return cls(
            kind=word(gate_pb2.Check.Kind.Name(message.kind), "KIND"),
            subject=message.subject.removeprefix("runs/").replace("/regions/", " "),
            figure=message.figure,
            low=message.low if message.HasField("low") else None,
            high=message.high if message.HasField("high") else None,
            bound=message.bound,
            trials=message.trials,
            passed=message.passed,
            rule=message.rule,
        )

    def __str__(self) -> str:
        if self.kind == "file":
            return "as served" if self.passed else "unfit"
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.figure:.4g}{interval}"


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """Whether a candidate may take the place of the version that callers get, and every check that says so."""

    id: str
    model: str
    base_version: int
    # SHA-256 of the candidate's ONNX file.
    digest: str
    # `runs/{run}/corrections/{correction}`; empty for a file of somebody else's.
    correction: str
    dataset: str
    checks: tuple[GateCheck, ...]
    passed: bool
    create_time: datetime

    @classmethod
    def from_proto(cls, message: gate_pb2.GateVerdict) -> Self:
        return cls(
            id=names.last(message.name),
            model=names.last(names.parent(message.name)),
            base_version=message.base_version,
            digest=message.digest,
            correction=message.correction,
            dataset=names.last(message.dataset),
            checks=tuple(GateCheck.from_proto(check) for check in message.checks),
            passed=message.passed,
            create_time=moment(message.create_time),
        )

    @property
    def failed(self) -> tuple[GateCheck, ...]:
        """The checks that the candidate did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        from defuse import notebook

        return notebook.of_verdict(self)
