"""Entries of Triton's model repository: the same for NVIDIA's ONNX Runtime backend and for the embedded one."""

from collections.abc import Sequence

from defuse import names
from defuse.guard_outputs import INDEX, INSIDE, OUTPUTS, REGION, RISK, TYPICALITY
from defuse.v1 import model_pb2
from tritonclient.grpc import model_config_pb2

# How long Triton may hold a request back to fill a batch.
_QUEUE_DELAY_US = 200
_GUARD_TYPES = {
    REGION: model_config_pb2.TYPE_STRING,
    INDEX: model_config_pb2.TYPE_INT64,
    RISK: model_config_pb2.TYPE_FP32,
    INSIDE: model_config_pb2.TYPE_BOOL,
    TYPICALITY: model_config_pb2.TYPE_FP32,
}
_ONNX_RUNTIME = "onnxruntime"


def classifier_config(model: model_pb2.Model, model_id: str, versions: Sequence[int]) -> model_config_pb2.ModelConfig:
    """Return the entry of a classifier."""
    config = _entry(model, model_id)
    config.output.append(_logits(model))
    _run_by_onnx_runtime(config, model, versions)
    return config


def guard_config(model: model_pb2.Model, versions: Sequence[int]) -> model_config_pb2.ModelConfig:
    """Return the entry of a model's guard."""
    config = _entry(model, names.guard_model(names.last(model.name)))
    config.output.extend(_guard_outputs(model))
    _run_by_onnx_runtime(config, model, versions)
    return config


def guarded_config(model: model_pb2.Model) -> model_config_pb2.ModelConfig:
    """Return the entry of the ensemble of a model and its guard: of each the version that callers get now."""
    model_id = names.last(model.name)
    config = _entry(model, names.guarded_model(model_id))
    config.platform = "ensemble"
    config.output.append(_logits(model))
    config.output.extend(_guard_outputs(model))
    steps = {model_id: [model.output_name], names.guard_model(model_id): list(OUTPUTS)}
    for name, outputs in steps.items():
        step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        step.input_map[model.input_name] = model.input_name
        step.output_map.update({output: output for output in outputs})
    return config


def _entry(model: model_pb2.Model, model_id: str) -> model_config_pb2.ModelConfig:
    """Return what all that take a model's images have in common."""
    height, width, channels = model.image_shape
    nchw = model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NCHW
    image = [channels, height, width] if nchw else [height, width, channels]
    config = model_config_pb2.ModelConfig(name=model_id, max_batch_size=model.max_batch_size)
    config.input.add(
        name=model.input_name,
        data_type=model_config_pb2.DataType.Value(f"TYPE_{model.input_datatype}"),
        dims=[*_batch(model), *image],
    )
    return config


def _batch(model: model_pb2.Model) -> list[int]:
    """Return the batch dimension of a graph that fixes it; Triton adds the others'."""
    return [model.fixed_batch_size] if model.fixed_batch_size else []


def _logits(model: model_pb2.Model) -> model_config_pb2.ModelOutput:
    return model_config_pb2.ModelOutput(
        name=model.output_name, data_type=model_config_pb2.TYPE_FP32, dims=[*_batch(model), len(model.classes)]
    )


def _guard_outputs(model: model_pb2.Model) -> list[model_config_pb2.ModelOutput]:
    return [
        model_config_pb2.ModelOutput(name=name, data_type=_GUARD_TYPES[name], dims=[*_batch(model), 1])
        for name in OUTPUTS
    ]


def _run_by_onnx_runtime(config: model_config_pb2.ModelConfig, model: model_pb2.Model, versions: Sequence[int]) -> None:
    config.backend = _ONNX_RUNTIME
    # One instance uses all cores by itself; Triton's default of two makes them compete.
    config.instance_group.add(count=1)
    config.version_policy.specific.versions[:] = sorted(versions)
    _warm_up(config)
    if not model.fixed_batch_size:
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY_US


def _warm_up(config: model_config_pb2.ModelConfig) -> None:
    """Have Triton ask a version for the smallest and the largest batch before anybody else does."""
    for size in sorted({min(1, config.max_batch_size), config.max_batch_size}):
        warm_up = config.model_warmup.add(name=f"batch {size}", batch_size=size, count=1)
        for entry in config.input:
            warm_up.inputs[entry.name].data_type = entry.data_type
            warm_up.inputs[entry.name].dims.extend(entry.dims)
            warm_up.inputs[entry.name].zero_data = True
