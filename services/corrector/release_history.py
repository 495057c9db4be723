"""The history of a model.

Every version and every release is a record, which is written once.
"""

import hashlib
import time
import uuid
from dataclasses import asdict, dataclass

from defuse import names
from defuse.errors import AlreadyExists, InvalidInput, NotFound, NotReady
from defuse.v1 import correction_pb2, model_pb2, release_pb2

from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

_CANDIDATE = "-candidate"
# Infix of the temporary names under which files are served for the gate.
AT_GATE = "-gate-"
_KEPT_ENDINGS = (_CANDIDATE, names.GUARD, names.GUARDED)


def candidate_id(model_id: str) -> str:
    """Return the name under which a model's candidates are served."""
    return f"{model_id}{_CANDIDATE}"


def gate_id(model_id: str) -> str:
    """Return a temporary name for a file that the gate checks."""
    return f"{model_id}{AT_GATE}{uuid.uuid4().hex[:8]}"


def check_model_id(model_id: str) -> None:
    """Raise InvalidInput for a name that is reserved for another purpose."""
    if model_id.endswith(_KEPT_ENDINGS) or AT_GATE in model_id:
        raise InvalidInput(
            f"model name {model_id!r} ends with one of {', '.join(map(repr, _KEPT_ENDINGS))} or has {AT_GATE!r} in it; "
            "these are reserved for names that belong to a model; choose another",
            reason="INVALID_ID",
        )


Kind = release_pb2.Release


@dataclass(frozen=True, kw_only=True)
class ChangeAuthor:
    """The author of a change and the reason for it.

    A release also has the passing verdict, or the approver who overrode it.
    """

    actor: str = ""
    reason: str = ""
    verdict: str = ""
    approver: str = ""
    # Chosen by the caller; work done for it is not repeated.
    request_id: str = ""


NO_AUTHOR = ChangeAuthor()


class ReleaseHistory:
    """Reads and writes the records of models, versions and releases."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.catalog = Catalog(store)

    def uploaded_file(self, declared: model_pb2.Model, file_digest: str) -> bytes:
        """Return the file of a model that is about to be registered.

        Raises InvalidInput for a reserved name, AlreadyExists for a registered model, and NotFound for a file that was
        not uploaded.
        """
        model_id = names.last(names.check(declared.name, "models/*"))
        check_model_id(model_id)
        if self.store.exists(keys.model(declared.name)):
            raise AlreadyExists(
                f"model {model_id!r} is registered already; correct and release it, or choose another name",
                reason="MODEL_EXISTS",
            )
        if not self.store.exists(keys.file(file_digest)):
            raise NotFound(f"no file {file_digest} was uploaded; upload the ONNX file first", reason="FILE_NOT_FOUND")
        return self.store.read_bytes(keys.file(file_digest))

    def check_publishable(self, correction: correction_pb2.Correction) -> model_pb2.Model:
        """Return the model of a correction that may be published now.

        Raises AlreadyExists when the correction was released before, and NotReady when its base version is no longer
        the champion.
        """
        model = self.catalog.model(correction.model)
        for release in self.catalog.releases(model.name):
            if release.correction == correction.name:
                done = "handed over" if release.kind == Kind.KIND_HANDED_OVER else "released"
                raise AlreadyExists(
                    f"{correction.name} was {done} already, as version {release.version}", reason="ALREADY_RELEASED"
                )
        if correction.base_version != model.champion_version:
            raise NotReady(
                f"{correction.name} starts from version {correction.base_version}, but callers get version "
                f"{model.champion_version} now; correct that one",
                reason="BASE_VERSION_CHANGED",
            )
        return model

    def made(self, model_name: str, request_id: str) -> release_pb2.Release | None:
        """Return the change that was made for a request, or None."""
        changes = self.catalog.releases(model_name) if request_id else []
        return next((change for change in changes if change.request_id == request_id), None)

    def registered_for(self, declared: model_pb2.Model, request_id: str) -> bool:
        """Return whether a model was completely registered for a request."""
        name = names.check(declared.name, "models/*")
        return self.store.exists(keys.model(name)) and self.made(name, request_id) is not None

    def versions(self, model_name: str) -> list[model_pb2.ModelVersion]:
        """Return the versions of a model, released or not, ascending."""
        record_keys = sorted(self.store.keys(f"{model_name}/versions"), key=lambda key: int(names.last(key)))
        written = [keys.model_version(model_name, int(names.last(key))) for key in record_keys]
        return [self.store.read_message(key, model_pb2.ModelVersion) for key in written if self.store.exists(key)]

    def version_of(self, model: model_pb2.Model, correction: correction_pb2.Correction) -> int:
        """Return the version number of a correction.

        The version is written first when it does not exist yet.
        """
        versions = self.versions(model.name)
        for version in versions:
            if version.correction == correction.name:
                return int(names.last(version.name))
        file = self.store.read_bytes(keys.corrected_file(correction.name))
        return self.write_version(model, int(names.last(versions[-1].name)) + 1, file, correction=correction.name)

    def write_version(self, model: model_pb2.Model, version: int, file: bytes, *, correction: str = "") -> int:
        """Write a version's file and record, and return its number."""
        record = model_pb2.ModelVersion(
            name=names.model_version(model.name, version),
            digest=hashlib.sha256(file).hexdigest(),
            correction=correction,
        )
        record.create_time.GetCurrentTime()
        self.store.write_bytes(keys.model_file(model.name, version), file)
        self.store.write_message(keys.model_version(model.name, version), record)
        return version

    def candidate_number(self, model_name: str, file: bytes) -> int:
        """Return the number of a candidate's file.

        Equal files have equal numbers, and no number is reused.
        """
        digest = hashlib.sha256(file).hexdigest()
        known = [self.store.read_bytes(key).decode() for key in self.store.keys(keys.candidates(model_name))]
        if digest not in known:
            known.append(digest)
            self.store.write_bytes(f"{keys.candidates(model_name)}/{len(known):06d}", digest.encode())
        return known.index(digest) + 1

    def replaced_by(self, model: model_pb2.Model) -> int:
        """Return the version that the champion replaced when it was published.

        The result is 0 for the first version.
        """
        for release in self.catalog.releases(model.name):
            if release.kind in {Kind.KIND_REGISTERED, Kind.KIND_RELEASED} and release.version == model.champion_version:
                return release.previous_version
        return 0

    def record(
        self,
        model_name: str,
        kind: "release_pb2.Release.Kind.ValueType",
        *,
        version: int,
        previous: int,
        correction: str = "",
        author: ChangeAuthor = NO_AUTHOR,
    ) -> release_pb2.Release:
        """Write the record of a change and return it."""
        release = release_pb2.Release(
            model=model_name,
            kind=kind,
            version=version,
            previous_version=previous,
            correction=correction,
            **asdict(author),
        )
        release.create_time.GetCurrentTime()
        # Nanoseconds come first, so that keys sort by time.
        key = f"{keys.releases(model_name)}/{time.time_ns():020d}-{uuid.uuid4().hex[:6]}.pb"
        self.store.write_message(key, release)
        return release
