"""The client of the gateway: one method a call, deadlines by default, errors by class."""

from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Self, TypeVar

from defuse.blocking import perform, read
from defuse.calls import audit as audit_calls
from defuse.calls import corrections as correction_calls
from defuse.calls import datasets as dataset_calls
from defuse.calls import guards as guard_calls
from defuse.calls import models as model_calls
from defuse.calls import monitoring as monitoring_calls
from defuse.calls import operations as operation_calls
from defuse.calls import regions as region_calls
from defuse.calls import runs as run_calls
from defuse.calls import trials as trial_calls
from defuse.connection import Connection, find_gateway
from defuse.latent_space import LatentSpace
from defuse.methods import described
from defuse.operation import Operation
from defuse.steps import Steps, Stream

P = ParamSpec("P")
T = TypeVar("T")


def _asked(description: Callable[P, Steps[T]]) -> "Callable[Concatenate[Client, P], T]":
    """Return the method that carries a described call out."""

    @described(description)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return perform(self._connection, description(*args, **kwargs))

    return method


def _followed(description: Callable[P, Stream[T]]) -> "Callable[Concatenate[Client, P], Iterator[T]]":
    """Return the method that yields what a described stream gives."""

    @described(description)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return read(self._connection, description(*args, **kwargs))

    return method


class Client:
    """A connection to a gateway. Use it as a context manager, or call `close`; `defuse.aio.Client` is its like.

    Args:
        address: HOST:PORT of the gateway. By default `DEFUSE_GATEWAY`, else the local stack that `defuse up` started.
        timeout_s: Deadline of calls that answer at once.
        token: Who calls, where the gateway asks for it. By default `DEFUSE_TOKEN`, else what `DEFUSE_TOKEN_FILE` holds.

    Every method raises a subclass of DefuseError: see `defuse.errors`.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0, token: str | None = None) -> None:
        self._connection = Connection(address or find_gateway(), timeout_s=timeout_s, token=token)
        self.address = self._connection.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    version = _asked(model_calls.version)

    add_model = _asked(model_calls.add_model)
    model = _asked(model_calls.model)
    models = _asked(model_calls.models)
    releases = _asked(model_calls.releases)
    judge = _asked(model_calls.judge)
    verdict = _asked(model_calls.verdict)
    rollback = _asked(model_calls.rollback)

    create_guard = _asked(guard_calls.create_guard)
    guard = _asked(guard_calls.guard)
    guards = _asked(guard_calls.guards)

    add_dataset = _asked(dataset_calls.add_dataset)

    create_run = _asked(run_calls.create_run)
    estimate_run = _asked(run_calls.estimate_run)
    run = _asked(run_calls.run)
    runs = _asked(run_calls.runs)
    watch_run = _followed(run_calls.watch_run)
    wait_for_run = _asked(run_calls.wait_for_run)
    cancel_run = _asked(run_calls.cancel_run)
    failures = _followed(run_calls.failures)
    advise_validity = _asked(run_calls.advise_validity)

    regions = _asked(region_calls.regions)
    region = _asked(region_calls.region)
    sample_region = _asked(region_calls.sample_region)
    diff_regions = _asked(region_calls.diff_regions)
    export_regions = _asked(region_calls.export_regions)
    annotate = _asked(region_calls.annotate)

    create_correction = _asked(correction_calls.create_correction)
    correction = _asked(correction_calls.correction)
    corrections = _asked(correction_calls.corrections)
    wait_for_correction = _asked(correction_calls.wait_for_correction)
    cancel_correction = _asked(correction_calls.cancel_correction)
    release = _asked(correction_calls.release)

    start_trial = _asked(trial_calls.start_trial)
    trials = _asked(trial_calls.trials)
    trial = _asked(trial_calls.trial)
    stop_trial = _asked(trial_calls.stop_trial)

    monitor = _asked(monitoring_calls.monitor)
    configure_monitor = _asked(monitoring_calls.configure_monitor)
    alerts = _asked(monitoring_calls.alerts)
    watch_alerts = _followed(monitoring_calls.watch_alerts)
    start_alert_run = _asked(monitoring_calls.start_alert_run)
    attach_truth = _asked(monitoring_calls.attach_truth)
    delete_observations = _asked(monitoring_calls.delete_observations)

    audit_events = _asked(audit_calls.audit_events)

    def latent_space(self, run_id: str) -> LatentSpace:
        """Return the run's VAE: encode, decode, interpolate."""
        return LatentSpace(self._connection, run_id)

    def operation(self, name: str) -> Operation:
        """Return what takes long, by its name: `Run.operation`, `Correction.operation`."""
        return Operation(self._connection, perform(self._connection, operation_calls.operation(name)))

    def operations(self, run_id: str = "", *, model: str = "", done: bool | None = None) -> list[Operation]:
        """Return the operations of a run, of all runs, newest first, or the releases of a model; `done` says which."""
        found = perform(self._connection, operation_calls.operations(run_id, model=model, done=done))
        return [Operation(self._connection, status) for status in found]
