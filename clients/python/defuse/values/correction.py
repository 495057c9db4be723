"""A correction: what was tried, what was chosen, and what it changed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Self

from defuse import names
from defuse.v1 import correction_pb2
from defuse.values.estimate import Estimate
from defuse.values.gate import GateVerdict
from defuse.values.plain import moment, settings, word


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Accuracy after minus accuracy before on the same images, with its 95 % score interval (Tango, 1998).

    `gained` are images that only the version after reads correctly, `lost` those that only the one before does;
    `p_value` is McNemar's, exact.
    """

    value: float
    low: float
    high: float
    gained: int
    lost: int
    trials: int
    p_value: float

    @classmethod
    def from_proto(cls, message: correction_pb2.PairedDifference) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        if not self.trials:
            return "not measured"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, kw_only=True)
class CorrectionPoint:
    """Weights that were tried. `regions` is measured on the images that decide: held-out failures and fresh ones.

    `method` is one of `correction_settings.METHODS`, `region_weight` lambda, `share` the share of the way from the
    weights before to those after the training: 1 but for interpolation.
    """

    method: str
    region_weight: float
    learning_rate: float
    share: float
    test: Estimate
    test_change: PairedDifference
    regions: Estimate
    # Mean cross entropy on the same images, in nats.
    regions_loss: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Why a point was chosen. Where no point was non-inferior, it is the one with the least possible loss."""

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
    """Accuracy on one region's held-out images, before and after, and the answers for its pictures."""

    region: str
    label: str
    before: Estimate
    after: Estimate
    # Class names, in the order of `RegionPictures.exemplars`.
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
    """The deployed weights, fine-tuned in several ways. `state` is running, succeeded, failed or cancelled."""

    id: str
    run: str
    model: str
    base_version: int
    config: Mapping[str, Any]
    state: str
    progress: float
    note: str
    error: str
    # What was tried so far, in the order of methods and lambdas.
    points: tuple[CorrectionPoint, ...]
    # Why trainings failed, in words; the others go on.
    failures: tuple[str, ...]
    # None until it has succeeded.
    choice: Choice | None
    # Of the chosen candidate, through Triton; the region images had no part in the choice.
    test_before: Estimate
    test_after: Estimate
    test_change: PairedDifference
    regions_before: Estimate
    regions_after: Estimate
    regions: tuple[RegionChange, ...]
    # Largest difference between torch and ONNX Runtime for each batch size.
    parity: Mapping[int, float]
    candidate: str
    candidate_version: int
    # What the gate said of the candidate; None until it has succeeded.
    verdict: GateVerdict | None
    # Name of the same as an operation: `Client.operation`.
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
            state=word(correction_pb2.Correction.State.Name(message.state), "STATE"),
            progress=message.progress,
            note=message.note,
            error=message.error,
            points=tuple(_points(message)),
            failures=tuple(_failures(message)),
            choice=Choice.from_proto(result.choice) if message.HasField("result") else None,
            test_change=PairedDifference.from_proto(result.test_change),
            regions=tuple(RegionChange.from_proto(change) for change in result.regions),
            parity={entry.batch_size: entry.max_abs_difference for entry in result.parity},
            candidate=result.candidate,
            candidate_version=result.candidate_version,
            verdict=GateVerdict.from_proto(result.verdict) if result.HasField("verdict") else None,
            operation=message.operation,
            create_time=moment(message.create_time),
            **{name: Estimate.from_proto(getattr(result, name)) for name in figures},
        )

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        from defuse import notebook

        return notebook.of_correction(self)


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


def _failures(message: correction_pb2.Correction) -> list[str]:
    return [
        f"{_method(one.method)}, lambda {one.region_weight:g}, rate {one.learning_rate:g}: {one.error}"
        for one in message.trainings
        if one.error
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
        "augmentation": settings(config.augmentation),
        "torch_factory": config.torch_factory.function,
    }


def _method(value: correction_pb2.Training.Method.ValueType, share: float = 0.0) -> str:
    """Return the word of a method; the end of an interpolation is a training of all weights."""
    if value == correction_pb2.Training.METHOD_INTERPOLATION and share == 1:
        value = correction_pb2.Training.METHOD_ALL_WEIGHTS
    return word(correction_pb2.Training.Method.Name(value), "METHOD")
