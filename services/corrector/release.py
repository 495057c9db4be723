"""Versions of a model: registered, published, taken back. Every change is one record in the store."""

import fcntl
import hashlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from defuse import names
from defuse.errors import AlreadyExists, NotFound, NotReady
from defuse.v1 import correction_pb2, model_pb2, release_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.corrector.repository import TritonRepository, candidate_id, check_model_id
from services.corrector.signature import read_signature
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.catalog import Catalog


class Releases:
    """Changes which version callers get. One change at a time, across processes that share the repository."""

    def __init__(self, store: ArtifactStore, repository: TritonRepository, root: Path) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._repository = repository
        self._root = root

    def register(self, declared: model_pb2.Model, file_digest: str) -> model_pb2.Model:
        """Check a file against its declaration and serve it as version 1."""
        model_id = names.last(names.check(declared.name, "models/*"))
        check_model_id(model_id)
        if not self._store.exists(catalog.file(file_digest)):
            raise NotFound(f"no file {file_digest} was uploaded; upload the ONNX file first", reason="FILE_NOT_FOUND")
        file = self._store.read_bytes(catalog.file(file_digest))
        model = read_signature(declared, file)
        model.create_time.GetCurrentTime()
        with self._exclusively():
            if self._store.exists(catalog.model(model.name)):
                raise AlreadyExists(
                    f"model {model_id!r} is registered already; correct and release it, or choose another name",
                    reason="MODEL_EXISTS",
                )
            self._clear(model)
            self._write_version(model, 1, file, correction="")
            self._repository.serve(model, model_id, [1])
            self._record(model.name, release_pb2.Release.KIND_REGISTERED, version=1, previous=0)
            # Written last: a model exists once it is served.
            self._store.write_message(catalog.model(model.name), model)
        return self._catalog.model(model.name)

    def publish(self, correction: correction_pb2.Correction) -> release_pb2.Release:
        """Serve a correction's file as a new version beside the one that callers got until now."""
        with self._exclusively():
            model = self._catalog.model(correction.model)
            self._check_publishable(model, correction)
            version = self._version_of(model, correction)
            self._repository.serve(model, names.last(model.name), [model.champion_version, version])
            self._repository.withdraw(candidate_id(names.last(model.name)))
            return self._record(
                model.name,
                release_pb2.Release.KIND_RELEASED,
                version=version,
                previous=model.champion_version,
                correction=correction.name,
            )

    def restore_previous(self, model_name: str) -> release_pb2.Release:
        """Give callers the version that the present one replaced."""
        with self._exclusively():
            model = self._catalog.model(model_name)
            previous = self._replaced_by(model)
            if not previous:
                raise NotReady(
                    f"model {names.last(model_name)!r} serves version {model.champion_version}, its first; "
                    "there is none before it",
                    reason="NO_PREVIOUS_VERSION",
                )
            self._repository.serve(model, names.last(model.name), [previous])
            return self._record(
                model.name,
                release_pb2.Release.KIND_ROLLED_BACK,
                version=previous,
                previous=model.champion_version,
            )

    def serve_candidate(self, model: model_pb2.Model, file: bytes) -> tuple[str, int]:
        """Serve a file beside the champion, under a name of its own; return that name and the version."""
        with self._exclusively():
            model_id = candidate_id(names.last(model.name))
            version = max(self._repository.versions(model_id), default=0) + 1
            self._repository.add_version(model_id, version, file)
            self._repository.serve(model, model_id, [version])
            return model_id, version

    def _clear(self, model: model_pb2.Model) -> None:
        """Remove what a registration that was refused left behind; a directory of somebody else's is not touched."""
        model_id = names.last(model.name)
        if self._store.exists(catalog.model_version(model.name, 1)):
            self._repository.remove(model_id)
        elif self._repository.versions(model_id):
            raise AlreadyExists(
                f"the Triton repository has a model {model_id!r} that is not registered here; choose another name",
                reason="MODEL_EXISTS",
            )

    def _check_publishable(self, model: model_pb2.Model, correction: correction_pb2.Correction) -> None:
        for release in self._catalog.releases(model.name):
            if release.correction == correction.name:
                raise AlreadyExists(
                    f"{correction.name} was released already, as version {release.version}", reason="ALREADY_RELEASED"
                )
        if correction.base_version != model.champion_version:
            raise NotReady(
                f"{correction.name} starts from version {correction.base_version}, but callers get version "
                f"{model.champion_version} now; correct that one",
                reason="BASE_VERSION_CHANGED",
            )

    def _version_of(self, model: model_pb2.Model, correction: correction_pb2.Correction) -> int:
        """Return the version of a correction, written if a process that died did not write it already."""
        model_id = names.last(model.name)
        for version in self._repository.versions(model_id):
            key = catalog.model_version(model.name, version)
            if self._store.read_message(key, model_pb2.ModelVersion).correction == correction.name:
                return version
        version = max(self._repository.versions(model_id)) + 1
        self._write_version(
            model, version, self._store.read_bytes(catalog.corrected_file(correction.name)), correction=correction.name
        )
        return version

    def _replaced_by(self, model: model_pb2.Model) -> int:
        """Return the version that the champion replaced when it was published; 0 for the first."""
        published = (release_pb2.Release.KIND_REGISTERED, release_pb2.Release.KIND_RELEASED)
        for release in self._catalog.releases(model.name):
            if release.kind in published and release.version == model.champion_version:
                return release.previous_version
        return 0

    def _write_version(self, model: model_pb2.Model, version: int, file: bytes, *, correction: str) -> None:
        record = model_pb2.ModelVersion(
            name=names.model_version(model.name, version),
            digest=hashlib.sha256(file).hexdigest(),
            correction=correction,
        )
        record.create_time.GetCurrentTime()
        self._store.write_bytes(catalog.model_file(model.name, version), file)
        self._store.write_message(catalog.model_version(model.name, version), record)
        self._repository.add_version(names.last(model.name), version, file)

    def _record(
        self,
        model_name: str,
        kind: release_pb2.Release.Kind.ValueType,
        *,
        version: int,
        previous: int,
        correction: str = "",
    ) -> release_pb2.Release:
        now = Timestamp()
        now.GetCurrentTime()
        release = release_pb2.Release(
            model=model_name,
            kind=kind,
            version=version,
            previous_version=previous,
            correction=correction,
            create_time=now,
        )
        # Nanoseconds first, so that the keys sort by time.
        key = f"{catalog.releases(model_name)}/{time.time_ns():020d}-{uuid.uuid4().hex[:6]}.pb"
        self._store.write_message(key, release)
        return release

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
