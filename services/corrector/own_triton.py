"""Releases in our own Triton repository: registration, publication and rollback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from defuse import names
from defuse.errors import AlreadyExists, InvalidInput, NotReady
from defuse.v1 import correction_pb2, model_pb2, release_pb2

from services.corrector.gate.comparison import ServedCandidate, Version
from services.corrector.release_history import NO_AUTHOR, ChangeAuthor, Kind, ReleaseHistory, candidate_id, gate_id
from services.corrector.signature import read_signature
from services.corrector.triton_repository import TritonRepository, ensemble_config, exclusive_lock, guard_config
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.triton.client import InferenceClient

# Candidates of a model that are served at once.
_CANDIDATES = 4


class Releases:
    """Changes the version that callers get.

    One change is made at a time, across all processes that share the repository.
    """

    def __init__(self, store: ArtifactStore, inference: InferenceClient, root: Path) -> None:
        self.history = ReleaseHistory(store)
        self._store = store
        self._inference = inference
        self._repository = TritonRepository(root, inference)
        self._root = root

    def register(
        self, declared: model_pb2.Model, file_digest: str, author: ChangeAuthor = NO_AUTHOR
    ) -> model_pb2.Model:
        """Check a file against its declaration and serve it as version 1.

        A repeated request has no further effect.
        """
        with exclusive_lock(self._root):
            if self.history.registered_for(declared, author.request_id):
                return self.history.catalog.model(declared.name)
            file = self.history.uploaded_file(declared, file_digest)
            model = read_signature(declared, file)
            model.create_time.GetCurrentTime()
            self._clear(model)
            self._write_version(model, self.history.write_version(model, 1, file))
            self._repository.serve(model, names.last(model.name), [1])
            self.history.record(model.name, Kind.KIND_REGISTERED, version=1, previous=0, author=author)
            # Written last: a model with a record is served.
            self._store.write_message(keys.model(model.name), model)
        return self.history.catalog.model(model.name)

    def publish(self, correction: correction_pb2.Correction, author: ChangeAuthor) -> release_pb2.Release:
        """Serve a correction's file as a new version, beside the present champion."""
        with exclusive_lock(self._root):
            if made := self.history.made(correction.model, author.request_id):
                return made
            model = self.history.check_publishable(correction)
            version = self.history.version_of(model, correction)
            self._write_version(model, version)
            self._repository.serve(model, names.last(model.name), [model.champion_version, version])
            return self.history.record(
                model.name,
                Kind.KIND_RELEASED,
                version=version,
                previous=model.champion_version,
                correction=correction.name,
                author=author,
            )

    def restore_previous(self, model_name: str, author: ChangeAuthor) -> release_pb2.Release:
        """Serve the version that the champion replaced, and record the rollback.

        Raises NotReady when the champion is the first version.
        """
        with exclusive_lock(self._root):
            model = self.history.catalog.model(model_name)
            if made := self.history.made(model_name, author.request_id):
                return made
            newest = self._repository.configured(names.last(model_name))[-1]
            if newest > model.champion_version:  # left by a release that died before its record
                previous, instead_of = model.champion_version, newest
            else:
                previous, instead_of = self.history.replaced_by(model), model.champion_version
            if not previous:
                raise NotReady(
                    f"model {names.last(model_name)!r} serves version {model.champion_version}, its first; "
                    "there is none before it",
                    reason="NO_PREVIOUS_VERSION",
                )
            self._repository.serve(model, names.last(model.name), [previous])
            return self.history.record(
                model.name,
                Kind.KIND_ROLLED_BACK,
                version=previous,
                previous=instead_of,
                author=author,
            )

    def version(self, model: model_pb2.Model, version: int) -> Version:
        """Return a version as callers get it."""
        return self._inference.classifier(model, version=version)

    def serve_candidate(self, model: model_pb2.Model, file: bytes) -> ServedCandidate:
        """Serve a file beside the champion under a candidate's name.

        The same file gets the same version. Earlier candidates stay served, up to `_CANDIDATES`, as one may be on
        trial.
        """
        with exclusive_lock(self._root):
            model_id = candidate_id(names.last(model.name))
            version = self.history.candidate_number(model.name, file)
            self._repository.add_version(model_id, version, file)
            others = [other for other in self._repository.versions(model_id) if other != version]
            self._repository.serve(model, model_id, [*others[1 - _CANDIDATES :], version])
        served = self._inference.classifier(model, version=version, model_id=model_id)
        return ServedCandidate(name=model_id, version=version, classifier=served)

    def withdraw_candidates(self, model_name: str) -> None:
        """Stop serving all candidates of a model."""
        with exclusive_lock(self._root):
            model_id = candidate_id(names.last(self.history.catalog.model(model_name).name))
            if self._repository.versions(model_id):
                self._repository.withdraw(model_id)

    def serve_guard(self, model: model_pb2.Model, file: bytes) -> int:
        """Serve a guard as `NAME-guard`, and model and guard as an ensemble.

        Returns the guard's version. The previous guard stays loaded for requests under way.
        """
        with exclusive_lock(self._root):
            guard = names.guard_model(names.last(model.name))
            before = self._repository.versions(guard)[-1:]
            version = 1 + max(before, default=0)
            self._repository.add_version(guard, version, file)
            self._repository.serve_as(guard_config(model, [*before, version]))
            self._repository.add_ensemble(names.guarded_model(names.last(model.name)))
            self._repository.serve_as(ensemble_config(model))
        return version

    @contextmanager
    def serving(self, model: model_pb2.Model, file: bytes) -> Iterator[Version]:
        """Serve a file under a temporary name while the block runs.

        Raises InvalidInput for a file that Triton cannot load.
        """
        model_id = gate_id(names.last(model.name))
        try:
            with exclusive_lock(self._root):
                self._repository.sweep()
                self._repository.add_version(model_id, 1, file)
                self._serve_at_gate(model, model_id)
            yield self._inference.classifier(model, version=1, model_id=model_id)
        finally:
            with exclusive_lock(self._root):
                self._repository.withdraw(model_id)

    def _serve_at_gate(self, model: model_pb2.Model, model_id: str) -> None:
        try:
            self._repository.serve(model, model_id, [1])
        except NotReady as error:
            raise InvalidInput(error.message, reason="NOT_LOADABLE") from error

    def _clear(self, model: model_pb2.Model) -> None:
        """Remove the files of a registration that failed.

        Raises AlreadyExists for the directory of a model that is not registered here.
        """
        model_id = names.last(model.name)
        if self._store.exists(keys.model_version(model.name, 1)):
            self._repository.remove(model_id)
        elif self._repository.versions(model_id):
            raise AlreadyExists(
                f"the Triton repository has a model {model_id!r} that is not registered here; choose another name",
                reason="MODEL_EXISTS",
            )

    def _write_version(self, model: model_pb2.Model, version: int) -> None:
        file = self._store.read_bytes(keys.model_file(model.name, version))
        self._repository.add_version(names.last(model.name), version, file)
