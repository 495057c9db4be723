"""Corrections of the deployed weights, and verdicts of the gate."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from defuse import names
from defuse.v1 import correction_pb2, gate_pb2
from defuse.values.primitives import Estimate, PairedDifference, enum_word, message_fields, to_datetime


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One check of the gate, which compares a figure with a bound.

    `kind` is file, test, class, calibration, region_gain, region, parity or latency. `subject` is the checked class,
    region or batch size.
    """

    kind: str
    subject: str
    figure: float
    # Ends of the 95 % interval; None for figures without one.
    low: float | None
    high: float | None
    bound: float
    # Images, or rounds of a measurement.
    trials: int
    passed: bool
    # The rule in words.
    rule: str

    @classmethod
    def from_proto(cls, message: gate_pb2.Check) -> Self:
        return cls(
            kind=enum_word(gate_pb2.Check.Kind.Name(message.kind), "KIND"),
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
    """The gate's verdict on a candidate, with every check."""

    id: str
    model: str
    # The released version that the candidate is compared with.
    base_version: int
    # SHA-256 of the candidate's ONNX file.
    digest: str
    # `runs/{run}/corrections/{correction}`; empty for an uploaded file.
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
            create_time=to_datetime(message.create_time),
        )

    @property
    def failed(self) -> tuple[GateCheck, ...]:
        """Return the failed checks."""
        return tuple(check for check in self.checks if not check.passed)


@dataclass(frozen=True, kw_only=True)
class CorrectionPoint:
    """One set of weights of a correction, with its figures.

    `method` is one of `defuse.calls.corrections.METHODS`, and `region_weight` is
    lambda. `share` is the position between the weights before (0) and after (1) the
    training; it is below 1 only for interpolation. `regions` is the accuracy on the
    images that decide: held-out failures and newly drawn ones.
    """

    method: str
    region_weight: float
    learning_rate: float
    share: float
    test: Estimate
    test_change: PairedDifference
    regions: Estimate
    # Mean cross entropy on the same region images, in nats.
    regions_loss: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen point of a correction, and the rule of the choice.

    If no point is non-inferior, it is the one with the largest lower bound on the change of test accuracy.
    """

    rule: str
    method: str
    region_weight: float
    learning_rate: float
    share: float
    non_inferior: bool

    @classmethod
    def from_proto(cls, message: correction_pb2.Choice) -> Self:
        return cls(
            rule=message.rule,
            method=_method(message.method, message.share),
            region_weight=message.region_weight,
            learning_rate=message.learning_rate,
            share=message.share,
            non_inferior=message.non_inferior,
        )


@dataclass(frozen=True, kw_only=True)
class RegionChange:
    """The accuracy on one region's held-out images, before and after."""

    region: str
    label: str
    before: Estimate
    after: Estimate
    # Predicted classes, in the order of `RegionPictures.exemplars`.
    exemplars_before: tuple[str, ...]
    exemplars_after: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: correction_pb2.RegionChange) -> Self:
        return cls(
            region=names.last(message.region),
            label=message.label,
            before=Estimate.from_proto(message.before),
            after=Estimate.from_proto(message.after),
            exemplars_before=tuple(message.exemplars_before),
            exemplars_after=tuple(message.exemplars_after),
        )


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Fine-tunings of the deployed weights, and the candidate chosen among them.

    `state` is running, succeeded, failed or cancelled.
    """

    id: str
    run: str
    model: str
    base_version: int
    config: Mapping[str, Any]
    state: str
    progress: float
    note: str
    error: str
    # Finished points, in the order of methods and lambdas.
    points: tuple[CorrectionPoint, ...]
    # Errors of failed trainings; the others continue.
    failures: tuple[str, ...]
    # None until the correction succeeds.
    choice: Choice | None
    # Of the chosen candidate, through Triton. The choice does not use these region images.
    test_before: Estimate
    test_after: Estimate
    test_change: PairedDifference
    regions_before: Estimate
    regions_after: Estimate
    regions: tuple[RegionChange, ...]
    # Largest difference between torch and ONNX Runtime, by batch size.
    parity: Mapping[int, float]
    candidate: str
    candidate_version: int
    # The gate's verdict on the candidate; None until the correction succeeds.
    verdict: GateVerdict | None
    # Operation name, for `Client.operation`.
    operation: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: correction_pb2.Correction) -> Self:
        result = message.result
        figures = ("test_before", "test_after", "regions_before", "regions_after")
        return cls(
            id=names.last(message.name),
            run=names.last(names.parent(message.name)),
            model=names.last(message.model),
            base_version=message.base_version,
            config=_config(message.config),
            state=enum_word(correction_pb2.Correction.State.Name(message.state), "STATE"),
            progress=message.progress,
            note=message.note,
            error=message.error,
            points=tuple(_points(message)),
            failures=tuple(_training_errors(message)),
            choice=Choice.from_proto(result.choice) if message.HasField("result") else None,
            test_change=PairedDifference.from_proto(result.test_change),
            regions=tuple(RegionChange.from_proto(change) for change in result.regions),
            parity={entry.batch_size: entry.max_abs_difference for entry in result.parity},
            candidate=result.candidate,
            candidate_version=result.candidate_version,
            verdict=GateVerdict.from_proto(result.verdict) if result.HasField("verdict") else None,
            operation=message.operation,
            create_time=to_datetime(message.create_time),
            **{name: Estimate.from_proto(getattr(result, name)) for name in figures},
        )

    @property
    def ended(self) -> bool:
        """Return whether the correction is finished."""
        return self.state in {"succeeded", "failed", "cancelled"}


def _points(message: correction_pb2.Correction) -> list[CorrectionPoint]:
    choice = message.result.choice
    return [
        CorrectionPoint(
            method=_method(training.method, point.share),
            region_weight=training.region_weight,
            learning_rate=training.learning_rate,
            share=point.share,
            test=Estimate.from_proto(point.test),
            test_change=PairedDifference.from_proto(point.test_change),
            regions=Estimate.from_proto(point.regions),
            regions_loss=point.regions_loss,
            chosen=(training.method, training.region_weight, training.learning_rate, point.share)
            == (choice.method, choice.region_weight, choice.learning_rate, choice.share),
        )
        for training in message.trainings
        for point in training.points
    ]


def _training_errors(message: correction_pb2.Correction) -> list[str]:
    return [
        f"{_method(training.method)}, lambda {training.region_weight:g}, rate {training.learning_rate:g}: "
        f"{training.error}"
        for training in message.trainings
        if training.error
    ]


def _config(config: correction_pb2.CorrectionConfig) -> dict[str, Any]:
    return {
        "region_weights": list(config.region_weights),
        "learning_rates": list(config.learning_rates),
        "methods": [_method(method) for method in config.methods],
        "epochs": config.epochs,
        "seed": config.seed,
        "margin": config.margin,
        "images_per_region": config.images_per_region,
        "unclustered_failures": config.unclustered_failures,
        "augmentation": message_fields(config.augmentation),
        "torch_factory": config.torch_factory.function,
    }


def _method(value: correction_pb2.Training.Method.ValueType, share: float = 0.0) -> str:
    """Return a method's name; an interpolation with share 1 is `all_weights`."""
    if value == correction_pb2.Training.METHOD_INTERPOLATION and share == 1:
        value = correction_pb2.Training.METHOD_ALL_WEIGHTS
    return enum_word(correction_pb2.Training.Method.Name(value), "METHOD")
