"""The configuration of a correction: its defaults, bounds and trainings."""

import math

from defuse.errors import InvalidInput
from defuse.v1 import correction_pb2
from defuse.v1.correction_pb2 import CorrectionConfig, Training

# Measurements behind each default: docs/reference/benchmarks.md, "Correction".
_DEFAULTS = {"margin": 0.01, "images_per_region": 1024}
_REGION_WEIGHTS = (0.3, 0.5)
_LEARNING_RATES = (1e-4, 1e-3)
_METHODS = (Training.METHOD_ALL_WEIGHTS, Training.METHOD_INTERPOLATION)
# Least and largest value of each setting; 0 takes the default.
_BOUNDS = {
    "epochs": (1, 10_000),
    "margin": (1e-9, 1.0),
    "images_per_region": (1, 1_000_000),
    "unclustered_failures": (1, 10_000_000),
    "augmentation.max_shift": (0.0, 1.0),
    "augmentation.max_rotation_degrees": (0.0, 180.0),
}
_MOST_TRAININGS = 100


def complete(config: CorrectionConfig) -> CorrectionConfig:
    """Return a configuration with defaults filled in.

    Raises InvalidInput for a value out of bounds.
    """
    for path, (least, largest) in _BOUNDS.items():
        section, _, name = path.rpartition(".")
        value = getattr(getattr(config, section) if section else config, name)
        if math.isnan(value) or (value and not least <= value <= largest):
            raise InvalidInput(
                f"{path} is {value}; it must lie between {least} and {largest}",
                reason="OUT_OF_BOUNDS",
                field=f"config.{path}",
            )
    for weight in config.region_weights:
        if not 0 <= weight < 1:
            raise InvalidInput(
                f"lambda is {weight}; it must be at least 0 and below 1",
                reason="OUT_OF_BOUNDS",
                field="config.region_weights",
            )
    for rate in config.learning_rates:
        if not 0 < rate <= 1:
            raise InvalidInput(
                f"learning rate is {rate}; it must be above 0 and at most 1",
                reason="OUT_OF_BOUNDS",
                field="config.learning_rates",
            )
    if config.torch_factory.weights_digest and not config.torch_factory.function:
        raise InvalidInput(
            "weights are given without a torch factory that takes them; name it, module:function",
            reason="BAD_FACTORY",
            field="config.torch_factory.function",
        )
    whole = CorrectionConfig()
    whole.CopyFrom(config)
    for name, default in _DEFAULTS.items():
        if not getattr(whole, name):
            setattr(whole, name, default)
    whole.region_weights[:] = sorted(set(config.region_weights or _REGION_WEIGHTS))
    whole.learning_rates[:] = sorted(set(config.learning_rates or _LEARNING_RATES))
    whole.methods[:] = list(dict.fromkeys(config.methods or _METHODS))
    _check_methods(whole)
    return whole


def trainings(config: CorrectionConfig) -> list[Training]:
    """Return the trainings of a complete configuration.

    Each method is trained at each learning rate and with each lambda that applies to it.
    """
    return [
        Training(method=method, region_weight=weight, learning_rate=rate)
        for method in config.methods
        for weight in _region_weights(method, config)
        for rate in config.learning_rates
    ]


def _region_weights(method: Training.Method.ValueType, config: CorrectionConfig) -> list[float]:
    if method == Training.METHOD_CONTINUED:
        return [0.0]
    if method == Training.METHOD_INTERPOLATION:
        return [config.region_weights[-1]]
    if method == Training.METHOD_ALL_WEIGHTS and Training.METHOD_INTERPOLATION in config.methods:
        return list(config.region_weights[:-1])  # the training at the largest lambda is the end of the interpolation
    return list(config.region_weights)


def _check_methods(config: CorrectionConfig) -> None:
    known = correction_pb2.Training.Method.values()
    if unknown := [method for method in config.methods if method not in known or not method]:
        raise InvalidInput(
            f"method {unknown[0]} is unknown; see `Training.Method`", reason="UNKNOWN_METHOD", field="config.methods"
        )
    count = len(trainings(config))
    if count > _MOST_TRAININGS:
        raise InvalidInput(
            f"{len(config.methods)} methods with {len(config.region_weights)} lambdas at {len(config.learning_rates)} "
            f"learning rates are {count} trainings; at most {_MOST_TRAININGS} are tried",
            reason="OUT_OF_BOUNDS",
        )
