"""Makes guards and has them served: one with each release, and when somebody asks for one."""

from defuse import names
from defuse.errors import DefuseError
from defuse.v1 import corrector_service_pb2, guard_pb2, release_pb2

from services.corrector.adopted import AnyReleases
from services.corrector.guard.building import FALSE_ALARM_RATE, GuardBuilder
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog


class Guards:
    """The guards of all models."""

    def __init__(self, store: ArtifactStore, releases: AnyReleases) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._releases = releases

    def requested(self, request: corrector_service_pb2.IssueGuardRequest) -> guard_pb2.Guard:
        """Return the guard of a request, made now unless it was before."""
        model = self._catalog.run(request.run).config.model
        for guard in self._catalog.guards(model) if request.request_id else ():
            if guard.request_id == request.request_id:
                return guard
        return self.issue(request.run, request.false_alarm_rate, request_id=request.request_id)

    def issue(self, run_name: str, false_alarm_rate: float = 0.0, *, request_id: str = "") -> guard_pb2.Guard:
        """Make a guard of the labelled regions of a run and serve it beside its model; a rate of 0 takes the default.

        Raises as `GuardBuilder.build` does, NotFound for an unknown run.
        """
        builder = GuardBuilder(self._store, self._catalog.run(run_name))
        built, model = builder.build(false_alarm_rate or FALSE_ALARM_RATE), builder.model
        model_id = names.last(model.name)
        record = built.record
        record.name = names.guard(model_id, str(self._releases.serve_guard(model, built.file)))
        record.guard_model, record.guarded_model = names.guard_model(model_id), names.guarded_model(model_id)
        record.model_version, record.request_id = model.champion_version, request_id
        record.create_time.GetCurrentTime()
        self._store.write_bytes(keys.onnx_of(record.name), built.file)
        self._store.write_message(keys.guard(record.name), record)
        return record

    def renew(self, run_name: str, release: release_pb2.Release) -> None:
        """Make the guard of a release that was made, once; a release does not fail for it."""
        guards, since = self._catalog.guards(release.model), release.create_time.ToNanoseconds()
        if any(guard.run == run_name and guard.create_time.ToNanoseconds() >= since for guard in guards):
            return
        try:
            self.issue(run_name)
        except DefuseError as error:
            telemetry.log().warning("no_guard", run=run_name, reason=error.reason, error=error.message)
