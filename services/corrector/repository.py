"""Triton's model repository, written so that Triton never sees half a version.

A version is an immutable directory: it is written under a temporary name and renamed. Which versions are loaded is
said in `config.pbtxt` by a `specific` policy; a changed policy takes effect when the model is loaded again.
"""

import fcntl
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from defuse.errors import DefuseError, InvalidInput, StoreFull
from defuse.v1 import model_pb2
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from services.runtime.inference import InferenceClient

CANDIDATE_SUFFIX = "-candidate"
# What the gate asks about is served under the model's name, this, and something of its own.
_AT_GATE = "-gate-"
# Who is there for longer was left by a process that died.
_LONGEST_AT_GATE_S = 6 * 3600.0
# How long Triton may hold a request back to fill a batch.
_QUEUE_DELAY_US = 200


class TritonRepository:
    """The one writer of a model repository."""

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
        """Write a version's directory; one that is there is left alone."""
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

    def serve(self, model: model_pb2.Model, model_id: str, versions: Sequence[int]) -> None:
        """Let Triton serve exactly these versions; callers that name none get the largest."""
        config = self._root / model_id / "config.pbtxt"
        partial = config.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
        partial.write_text(text_format.MessageToString(triton_config(model, model_id, versions)))
        partial.replace(config)
        self._inference.load(model_id)

    def configured(self, model_id: str) -> list[int]:
        """Return the versions that Triton was told to serve, ascending."""
        text = (self._root / model_id / "config.pbtxt").read_text()
        return sorted(text_format.Parse(text, model_config_pb2.ModelConfig()).version_policy.specific.versions)

    def withdraw(self, model_id: str) -> None:
        """Stop serving a model and remove its directory, also where Triton does not answer."""
        try:
            self._inference.unload(model_id)
        finally:
            self.remove(model_id)

    def sweep(self) -> None:
        """Remove what processes that died left at the gate."""
        for directory in self._root.glob(f"*{_AT_GATE}*"):
            if time.time() - directory.stat().st_mtime > _LONGEST_AT_GATE_S:
                with suppress(DefuseError):
                    self.withdraw(directory.name)

    def remove(self, model_id: str) -> None:
        """Remove the directory of a model that is not served."""
        shutil.rmtree(self._root / model_id, ignore_errors=True)


@contextmanager
def exclusively(root: Path) -> Iterator[None]:
    """Keep out all others that change what lies in a directory, in this process and in others, while the block runs."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def candidate_id(model_id: str) -> str:
    """Return the name under which a model's candidate is served."""
    return f"{model_id}{CANDIDATE_SUFFIX}"


def gate_id(model_id: str) -> str:
    """Return a name under which a file is served while the gate asks about it."""
    return f"{model_id}{_AT_GATE}{uuid.uuid4().hex[:8]}"


def check_model_id(model_id: str) -> None:
    """Raise InvalidInput for a name that candidates use."""
    if model_id.endswith(CANDIDATE_SUFFIX) or _AT_GATE in model_id:
        raise InvalidInput(
            f"model name {model_id!r} has {CANDIDATE_SUFFIX!r} or {_AT_GATE!r} in it, which are kept for candidates; "
            "choose another",
            reason="INVALID_ID",
        )


def triton_config(model: model_pb2.Model, model_id: str, versions: Sequence[int]) -> model_config_pb2.ModelConfig:
    """Return the entry of a model: the same for NVIDIA's ONNX Runtime backend and for the embedded one."""
    height, width, channels = model.image_shape
    nchw = model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NCHW
    image = [channels, height, width] if nchw else [height, width, channels]
    batch = [model.fixed_batch_size] if model.fixed_batch_size else []
    config = model_config_pb2.ModelConfig(name=model_id, backend="onnxruntime", max_batch_size=model.max_batch_size)
    # One instance uses all cores by itself; Triton's default of two makes them compete.
    config.instance_group.add(count=1)
    config.version_policy.specific.versions[:] = sorted(versions)
    config.input.add(
        name=model.input_name,
        data_type=model_config_pb2.DataType.Value(f"TYPE_{model.input_datatype}"),
        dims=[*batch, *image],
    )
    _warm_up(config)
    config.output.add(name=model.output_name, data_type=model_config_pb2.TYPE_FP32, dims=[*batch, len(model.classes)])
    if not model.fixed_batch_size:
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY_US
    return config


def _warm_up(config: model_config_pb2.ModelConfig) -> None:
    """Have Triton ask a version for the smallest and the largest batch before anybody else does."""
    for size in sorted({min(1, config.max_batch_size), config.max_batch_size}):
        warm_up = config.model_warmup.add(name=f"batch {size}", batch_size=size, count=1)
        for entry in config.input:
            warm_up.inputs[entry.name].data_type = entry.data_type
            warm_up.inputs[entry.name].dims.extend(entry.dims)
            warm_up.inputs[entry.name].zero_data = True
