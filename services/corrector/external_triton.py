"""Releases for an external Triton, whose repository is never written.

Versions are written to a directory from which Triton's operator takes them. Triton reports the versions that it serves,
and a change that its operator made to a delivered version is recorded.
"""

import asyncio
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from defuse import names
from defuse.errors import DefuseError, InvalidInput, NotReady, StoreFull
from defuse.v1 import correction_pb2, model_pb2, release_pb2
from google.protobuf import json_format, text_format

from services.corrector.evaluation import LocalVersion
from services.corrector.gate.comparison import ServedCandidate, Version
from services.corrector.own_triton import Releases
from services.corrector.release_history import NO_AUTHOR, ChangeAuthor, Kind, ReleaseHistory
from services.corrector.signature import read_signature
from services.corrector.triton_repository import classifier_config, ensemble_config, exclusive_lock, guard_config
from services.onnx_graph.onnx_files import TOLERANCE
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.triton.client import InferenceClient

# Random images on which an uploaded file must agree with the served version.
_COMPARED = 8
# How soon a version that the operator put into service is noticed.
_LOOK_EVERY_S = 5.0
OPERATOR = "operator of Triton"


class ExternalTritonReleases:
    """Registers models of an external Triton and delivers versions to its operator.

    It has the methods of `Releases`.
    """

    def __init__(self, store: ArtifactStore, inference: InferenceClient, root: Path) -> None:
        self.history = ReleaseHistory(store)
        self._store = store
        self._inference = inference
        self._root = root

    def register(
        self, declared: model_pb2.Model, file_digest: str, author: ChangeAuthor = NO_AUTHOR
    ) -> model_pb2.Model:
        """Register a model that Triton serves under this name.

        The file must be the served version. Raises NotReady when Triton does not serve the model, and InvalidInput when
        file and version give different answers.
        """
        if self.history.registered_for(declared, author.request_id):
            return self.history.catalog.model(declared.name)
        file = self.history.uploaded_file(declared, file_digest)
        model = read_signature(declared, file)
        model_id = names.last(model.name)
        version = self._inference.versions(model_id)[-1]
        if not model.fixed_batch_size:
            model.max_batch_size = min(model.max_batch_size, self._inference.max_batch_size(model_id) or 1)
        self._check_same(model, file, version)
        model.create_time.GetCurrentTime()
        self.history.write_version(model, version, file)
        self.history.record(model.name, Kind.KIND_REGISTERED, version=version, previous=0, author=author)
        self._store.write_message(keys.model(model.name), model)
        return self.history.catalog.model(model.name)

    def publish(self, correction: correction_pb2.Correction, author: ChangeAuthor) -> release_pb2.Release:
        """Write a correction's version directory and its verdict for the operator.

        Triton is left unchanged.
        """
        self.notice(correction.model)
        with exclusive_lock(self._root):
            return self._published(correction, author)

    def _published(self, correction: correction_pb2.Correction, author: ChangeAuthor) -> release_pb2.Release:
        if made := self.history.made(correction.model, author.request_id):
            return made
        model = self.history.check_publishable(correction)
        version = self.history.version_of(model, correction)
        verdict = json_format.MessageToJson(self.history.catalog.verdict(author.verdict), indent=2)
        self._hand_over(model, version, verdict)
        return self.history.record(
            model.name,
            Kind.KIND_HANDED_OVER,
            version=version,
            previous=model.champion_version,
            correction=correction.name,
            author=author,
        )

    def restore_previous(self, model_name: str, author: ChangeAuthor) -> release_pb2.Release:
        """Raise NotReady: the operator of Triton decides which version callers get."""
        model = self.history.catalog.model(model_name)
        raise NotReady(
            f"Triton at {self._inference.url} is not ours to change; have its operator serve the version of "
            f"{names.last(model.name)!r} that callers are to get ({author.reason or 'no reason given'})",
            reason="TRITON_ADOPTED",
        )

    def version(self, model: model_pb2.Model, version: int) -> Version:
        """Return a version that runs in this process, as the candidate does."""
        return LocalVersion(self._store.read_bytes(keys.model_file(model.name, version)), model)

    def serve_candidate(self, model: model_pb2.Model, file: bytes) -> ServedCandidate:
        """Return a candidate that runs in this process."""
        return ServedCandidate(name="", version=0, classifier=LocalVersion(file, model))

    def withdraw_candidates(self, model_name: str) -> None:
        """Do nothing, since Triton serves no candidates."""

    def serve_guard(self, model: model_pb2.Model, file: bytes) -> int:
        """Write a guard and the ensemble as repository entries for the operator.

        Returns the guard's version.
        """
        with exclusive_lock(self._root):
            guard, guarded = guard_config(model, [1]), ensemble_config(model)
            taken = [int(path.name) for path in (self._root / guard.name).glob("[0-9]*")]
            version = 1 + max(taken, default=0)
            guard.version_policy.specific.versions[:] = [version]
            with _naming_remedy(self._root / guard.name):
                (self._root / guard.name / str(version)).mkdir(parents=True)
                (self._root / guard.name / str(version) / "model.onnx").write_bytes(file)
                (self._root / guarded.name / "1").mkdir(parents=True, exist_ok=True)
                for config in (guard, guarded):
                    (self._root / config.name / "config.pbtxt").write_text(text_format.MessageToString(config))
        return version

    @contextmanager
    def serving(self, model: model_pb2.Model, file: bytes) -> Iterator[Version]:
        """Yield a version that runs a file in this process."""
        yield LocalVersion(file, model)

    def notice(self, model_name: str) -> None:
        """Record a change of version that Triton's operator made.

        Callers who name no version get the newest one that Triton serves. A version that was never delivered is
        ignored.
        """
        with exclusive_lock(self._root):
            self._notice(self.history.catalog.model(model_name))

    async def watch_versions(self) -> None:
        """Check the versions of all models periodically, without end."""
        while True:
            await asyncio.to_thread(self._notice_all)
            await asyncio.sleep(_LOOK_EVERY_S)

    def _notice_all(self) -> None:
        for key in self._store.keys("models"):
            if self._store.exists(keys.model(key)):
                try:
                    self.notice(key)
                except DefuseError as error:
                    telemetry.log().warning("model_not_served", model=key, error=error.message)

    def _notice(self, model: model_pb2.Model) -> None:
        model_name = model.name
        served = self._inference.versions(names.last(model_name))[-1]
        known = {int(names.last(version.name)) for version in self.history.versions(model_name)}
        if served == model.champion_version or served not in known:
            return
        released = served > model.champion_version
        handed_over = [one for one in self.history.catalog.releases(model_name) if one.version == served]
        self.history.record(
            model_name,
            Kind.KIND_RELEASED if released else Kind.KIND_ROLLED_BACK,
            version=served,
            previous=model.champion_version,
            correction=handed_over[-1].correction if released else "",
            author=ChangeAuthor(actor=OPERATOR, verdict=handed_over[-1].verdict if released else ""),
        )

    def _check_same(self, model: model_pb2.Model, file: bytes, version: int) -> None:
        height, width, channels = model.image_shape
        images = np.random.default_rng(0).random((_COMPARED, channels, height, width), np.float32)
        served = self._inference.classifier(model, version=version).classify(images)
        here = LocalVersion(file, model).classify(images)
        difference = float(np.abs(served - here).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(here).max())):
            raise InvalidInput(
                f"the file differs by {difference:.3g} from version {version} of {names.last(model.name)!r} at "
                f"{self._inference.url} on random images; bring the very file that is served",
                reason="ADOPTED_MISMATCH",
            )

    def _hand_over(self, model: model_pb2.Model, version: int, verdict: str) -> None:
        """Write a version's files for the operator.

        They are `NAME/VERSION/model.onnx`, `NAME/VERSION.verdict.json` and a `config.pbtxt` as a template.
        """
        model_id = names.last(model.name)
        directory = self._root / model_id
        partial = directory / f".partial-{version}-{uuid.uuid4().hex[:8]}"
        with _naming_remedy(directory, partial):
            partial.mkdir(parents=True)
            (partial / "model.onnx").write_bytes(self._store.read_bytes(keys.model_file(model.name, version)))
            (directory / f"{version}.verdict.json").write_text(verdict)
            config = classifier_config(model, model_id, [model.champion_version, version])
            (directory / "config.pbtxt").write_text(text_format.MessageToString(config))
            shutil.rmtree(
                directory / str(version), ignore_errors=True
            )  # left by a process that died before writing its record
            partial.rename(directory / str(version))


@contextmanager
def _naming_remedy(directory: Path, partial: Path | None = None) -> Iterator[None]:
    """Raise StoreFull with a remedy when a directory cannot be written.

    A partial directory is removed.
    """
    try:
        yield
    except OSError as error:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        raise StoreFull(f"cannot write {directory} ({error.strerror}); free space there") from error


AnyReleases = Releases | ExternalTritonReleases
