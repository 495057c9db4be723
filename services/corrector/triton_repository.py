"""The model repository of Triton: versions and the configuration of each entry.

A version is an immutable directory: it is written under a temporary name and renamed.
`config.pbtxt` lists the loaded versions in a `specific` policy, and a changed policy
takes effect when the model is loaded again. The entries work with NVIDIA's ONNX Runtime
backend and with the embedded one.
"""

import fcntl
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from defuse import names
from defuse.errors import DefuseError, StoreFull
from defuse.guard_outputs import INDEX, INSIDE, OUTPUTS, REGION, RISK, TYPICALITY
from defuse.v1 import model_pb2
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from services.corrector.release_history import AT_GATE
from services.triton.client import InferenceClient

# How long Triton may delay a request to fill a batch, in microseconds.
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
    """Return the configuration of a classifier."""
    config = _entry(model, model_id)
    config.output.append(_logits(model))
    _run_by_onnx_runtime(config, model, versions)
    return config


def guard_config(model: model_pb2.Model, versions: Sequence[int]) -> model_config_pb2.ModelConfig:
    """Return the configuration of a model's guard."""
    config = _entry(model, names.guard_model(names.last(model.name)))
    config.output.extend(_guard_outputs(model))
    _run_by_onnx_runtime(config, model, versions)
    return config


def ensemble_config(model: model_pb2.Model) -> model_config_pb2.ModelConfig:
    """Return the configuration of the ensemble of model and guard.

    The ensemble uses the versions that callers get now.
    """
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
    """Return the configuration that all models with the same images share."""
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
    """Return the batch dimension of a graph with a fixed batch size.

    Triton adds the dimension itself for other graphs, so it is then empty.
    """
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
    """Make Triton warm up with the smallest and the largest batch."""
    for size in sorted({min(1, config.max_batch_size), config.max_batch_size}):
        warm_up = config.model_warmup.add(name=f"batch {size}", batch_size=size, count=1)
        for entry in config.input:
            warm_up.inputs[entry.name].data_type = entry.data_type
            warm_up.inputs[entry.name].dims.extend(entry.dims)
            warm_up.inputs[entry.name].zero_data = True


# An older entry was left by a process that died.
_LONGESTAT_GATE_S = 6 * 3600.0


class TritonRepository:
    """Writes a model repository, as its only writer."""

    def __init__(self, root: Path, inference: InferenceClient) -> None:
        self._root = root
        self._inference = inference

    def versions(self, model_id: str) -> list[int]:
        """Return the versions that have a directory, ascending."""
        directory = self._root / model_id
        if not directory.is_dir():
            return []
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())

    def add_version(self, model_id: str, version: int, file: bytes) -> None:
        """Write a version's directory, unless it exists."""
        target = self._root / model_id / str(version)
        if target.exists():
            return
        partial = target.with_name(f".partial-{version}-{uuid.uuid4().hex[:8]}")
        try:
            partial.mkdir(parents=True)
            (partial / "model.onnx").write_bytes(file)
            partial.rename(target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise StoreFull(f"cannot write {target} ({error.strerror}); free space in {self._root}") from error

    def add_ensemble(self, model_id: str) -> None:
        """Write the only version of an ensemble, an empty directory."""
        (self._root / model_id / "1").mkdir(parents=True, exist_ok=True)

    def serve(self, model: model_pb2.Model, model_id: str, versions: Sequence[int]) -> None:
        """Make Triton serve exactly these versions of a classifier.

        Callers who name no version get the newest.
        """
        self.serve_as(classifier_config(model, model_id, versions))

    def serve_as(self, config: model_config_pb2.ModelConfig) -> None:
        """Make Triton serve the written files with this configuration."""
        file = self._root / config.name / "config.pbtxt"
        partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
        partial.write_text(text_format.MessageToString(config))
        partial.replace(file)
        self._inference.load(config.name)

    def configured(self, model_id: str) -> list[int]:
        """Return the configured versions, ascending."""
        text = (self._root / model_id / "config.pbtxt").read_text()
        return sorted(text_format.Parse(text, model_config_pb2.ModelConfig()).version_policy.specific.versions)

    def withdraw(self, model_id: str) -> None:
        """Stop serving a model and remove its directory.

        The directory is removed even when Triton does not answer.
        """
        try:
            self._inference.unload(model_id)
        finally:
            self.remove(model_id)

    def sweep(self) -> None:
        """Remove the temporary models that dead processes left behind."""
        for directory in self._root.glob(f"*{AT_GATE}*"):
            if time.time() - directory.stat().st_mtime > _LONGESTAT_GATE_S:
                with suppress(DefuseError):
                    self.withdraw(directory.name)

    def remove(self, model_id: str) -> None:
        """Remove the directory of a model that is not served."""
        shutil.rmtree(self._root / model_id, ignore_errors=True)


@contextmanager
def exclusive_lock(root: Path) -> Iterator[None]:
    """Lock a directory against other writers while the block runs.

    The other writers are in this process and in others.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
