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

from defuse.errors import DefuseError, StoreFull
from defuse.v1 import model_pb2
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from services.corrector.model_ids import AT_GATE
from services.corrector.triton_configs import classifier_config
from services.triton.client import InferenceClient

# Who is there for longer was left by a process that died.
_LONGESTAT_GATE_S = 6 * 3600.0


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

    def add_ensemble(self, model_id: str) -> None:
        """Write the one version of an ensemble: a directory with nothing in it."""
        (self._root / model_id / "1").mkdir(parents=True, exist_ok=True)

    def serve(self, model: model_pb2.Model, model_id: str, versions: Sequence[int]) -> None:
        """Let Triton serve exactly these versions of a classifier; callers that name none get the largest."""
        self.serve_as(classifier_config(model, model_id, versions))

    def serve_as(self, config: model_config_pb2.ModelConfig) -> None:
        """Let Triton serve what lies there as an entry says."""
        file = self._root / config.name / "config.pbtxt"
        partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
        partial.write_text(text_format.MessageToString(config))
        partial.replace(file)
        self._inference.load(config.name)

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
        for directory in self._root.glob(f"*{AT_GATE}*"):
            if time.time() - directory.stat().st_mtime > _LONGESTAT_GATE_S:
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
