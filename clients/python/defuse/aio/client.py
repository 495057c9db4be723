"""The client of the gateway for programs with an event loop: the methods of `defuse.Client`, awaited."""

from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from defuse.aio.connection import Connection
from defuse.aio.driver import perform, read
from defuse.aio.latent_space import LatentSpace
from defuse.aio.operation import Operation
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
from defuse.connection import find_gateway
from defuse.methods import described
from defuse.steps import Steps, Stream

P = ParamSpec("P")
T = TypeVar("T")


def _asked(description: Callable[P, Steps[T]]) -> "Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]":
    """Return the method that carries a described call out."""

    @described(description)
    async def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await perform(self._connection, description(*args, **kwargs))

    return method


def _followed(description: Callable[P, Stream[T]]) -> "Callable[Concatenate[Client, P], AsyncGenerator[T, None]]":
    """Return the method that yields what a described stream gives."""

    @described(description)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        return read(self._connection, description(*args, **kwargs))

    return method


class Client:
    """A connection to a gateway, within an event loop. Use it in `async with`, or await `close`.

    The methods are those of `defuse.Client`: what returns there is awaited here, what iterates is read by `async for`.
    Callbacks such as `on_change` are plain functions, called on the event loop.

    Args:
        address: HOST:PORT of the gateway. By default `DEFUSE_GATEWAY`, else the local stack that `defuse up` started.
        timeout_s: Deadline of calls that answer at once.
        token: Who calls, where the gateway asks for it. By default `DEFUSE_TOKEN`, else what `DEFUSE_TOKEN_FILE` holds.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0, token: str | None = None) -> None:
        self._connection = Connection(address or find_gateway(), timeout_s=timeout_s, token=token)
        self.address = self._connection.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

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

    async def operation(self, name: str) -> Operation:
        """Return what takes long, by its name: `Run.operation`, `Correction.operation`."""
        return Operation(self._connection, await perform(self._connection, operation_calls.operation(name)))

    async def operations(self, run_id: str = "", *, model: str = "", done: bool | None = None) -> list[Operation]:
        """Return the operations of a run, of all runs, newest first, or the releases of a model; `done` says which."""
        found = await perform(self._connection, operation_calls.operations(run_id, model=model, done=done))
        return [Operation(self._connection, status) for status in found]
