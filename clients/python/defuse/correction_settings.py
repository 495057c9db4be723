"""The settings of a correction as its creator gives them, and as they are sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defuse.errors import InvalidInput
from defuse.messages import message
from defuse.steps import Steps
from defuse.uploads import content_of, upload_bytes
from defuse.v1 import correction_pb2

METHODS = tuple(
    name.removeprefix("METHOD_").lower()
    for name in correction_pb2.Training.Method.keys()[1:]  # no dict
)


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """What a correction is made with; what is 0 or empty takes its default.

    region_weights: lambdas to try in the loss `(1 - lambda) CE(original) + lambda CE(regions)`, each in [0, 1).
    learning_rates: peak rates of Adam to try.
    methods: "all_weights", "last_layer" and "interpolation"; the baselines "unclustered" and "continued".
    margin: largest loss of test accuracy that is accepted, in [0, 1].
    unclustered_failures: single failures that the baseline learns from; as many as there are regions by default.
    augmentation: max_shift (share of the side), max_rotation_degrees, horizontal_flip; nothing by default.
    torch_factory: `module:function`, where the ONNX file has an operator that cannot be trained, and
        `weights`, a safetensors file of its state dict.
    """

    region_weights: Sequence[float] = ()
    learning_rates: Sequence[float] = ()
    methods: Sequence[str] = ()
    epochs: int = 0
    seed: int = 0
    margin: float = 0.0
    images_per_region: int = 0
    unclustered_failures: int = 0
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    torch_factory: str = ""
    weights: Path | str | None = None


def correction_config(settings: CorrectionSettings) -> Steps[correction_pb2.CorrectionConfig]:
    """Return what is sent; upload the weights that the settings name."""
    if unknown := [method for method in settings.methods if method not in METHODS]:
        raise InvalidInput(f"method {unknown[0]!r} is unknown; use some of {', '.join(METHODS)}")
    factory = {"function": settings.torch_factory}
    if settings.weights:
        factory["weights_digest"] = yield from upload_bytes((yield from content_of(settings.weights)))
    return message(
        correction_pb2.CorrectionConfig,
        {
            "region_weights": settings.region_weights,
            "learning_rates": settings.learning_rates,
            "methods": [f"METHOD_{method.upper()}" for method in settings.methods],
            "epochs": settings.epochs,
            "seed": settings.seed,
            "margin": settings.margin,
            "images_per_region": settings.images_per_region,
            "unclustered_failures": settings.unclustered_failures,
            "augmentation": message(correction_pb2.Augmentation, settings.augmentation),
            "torch_factory": message(correction_pb2.TorchFactory, factory),
        },
    )
