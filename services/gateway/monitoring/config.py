"""The configuration of a monitor, and a short-lived cache of models."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from defuse.errors import InvalidInput, NotFound
from defuse.v1 import model_pb2, monitor_pb2
from google.protobuf.duration_pb2 import Duration

from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

RUN_LENGTH = 100_000.0
_RUN_LENGTHS = (100.0, 1e12)
RETENTION = timedelta(days=7)
_RETENTIONS = (timedelta(hours=1), timedelta(days=3650))
_LONGEST_URL = 2048


def complete(config: monitor_pb2.MonitorConfig) -> monitor_pb2.MonitorConfig:
    """Return a configuration with defaults filled in.

    Raises InvalidInput for a value out of bounds.
    """
    whole = monitor_pb2.MonitorConfig(
        expected_run_length=config.expected_run_length or RUN_LENGTH,
        keep=config.keep or monitor_pb2.MonitorConfig.KEEP_IMAGES,
        webhook_url=config.webhook_url,
        start_runs=config.start_runs,
    )
    whole.retention.CopyFrom(config.retention if config.HasField("retention") else _duration(RETENTION))
    _check(whole)
    return whole


def read_config(store: ArtifactStore, model_name: str) -> monitor_pb2.MonitorConfig:
    """Return the stored configuration of a model, or the defaults."""
    try:
        return store.read_message(keys.monitor_config(model_name), monitor_pb2.MonitorConfig)
    except NotFound:
        return complete(monitor_pb2.MonitorConfig())


def retention(config: monitor_pb2.MonitorConfig) -> timedelta:
    """Return how long observations are kept."""
    return config.retention.ToTimedelta()


def _check(config: monitor_pb2.MonitorConfig) -> None:
    least, largest = _RUN_LENGTHS
    if not least <= config.expected_run_length <= largest or math.isnan(config.expected_run_length):
        raise _out_of_bounds("expected_run_length", f"{config.expected_run_length:g}", f"{least:g}", f"{largest:g}")
    shortest, longest = _RETENTIONS
    seconds = config.retention.seconds
    if not shortest.total_seconds() <= seconds <= longest.total_seconds():
        raise _out_of_bounds("retention", f"{seconds} s", str(shortest), str(longest))
    if config.keep not in monitor_pb2.MonitorConfig.Keep.values():
        raise InvalidInput(
            f"keep is {config.keep}; use KEEP_IMAGES or KEEP_LATENTS", reason="OUT_OF_BOUNDS", field="config.keep"
        )
    if config.webhook_url:
        _check_url(config.webhook_url)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and len(url) <= _LONGEST_URL
    except ValueError:
        usable = False
    if not usable:
        raise InvalidInput(
            f"{url[:80]!r} is no URL that alerts can be posted to; give one that begins with http:// or https://",
            reason="BAD_URI",
            field="config.webhook_url",
        )


def _out_of_bounds(field: str, value: str, least: str, largest: str) -> InvalidInput:
    return InvalidInput(
        f"{field} is {value}; it must lie between {least} and {largest}",
        reason="OUT_OF_BOUNDS",
        field=f"config.{field}",
    )


def _duration(length: timedelta) -> Duration:
    duration = Duration()
    duration.FromTimedelta(length)
    return duration


# How soon a new guard or configuration is seen.
_KNOWN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class MonitoredModel:
    """A model with its newest guard and its monitor's configuration."""

    model: model_pb2.Model
    # Name of the newest guard; empty without one.
    guard: str
    config: monitor_pb2.MonitorConfig


# Called with a model and a batch whose observations changed.
OnChange = Callable[[MonitoredModel, str], Awaitable[None]]


class MonitoredModels:
    """Reads models from the store, each at most once a second."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._known: dict[str, tuple[float, MonitoredModel]] = {}

    async def of(self, model_name: str) -> MonitoredModel:
        """Return a model; raise NotFound for an unknown name."""
        now = time.monotonic()
        read_at, subject = self._known.get(model_name, (-_KNOWN_S, None))
        if subject is None or now - read_at >= _KNOWN_S:
            subject = await asyncio.to_thread(self._read, model_name)
            self._known[model_name] = (now, subject)
        return subject

    def forget(self, model_name: str) -> None:
        """Drop a model from the cache after this gateway changed it."""
        self._known.pop(model_name, None)

    def _read(self, model_name: str) -> MonitoredModel:
        model = self.catalog.model(model_name)
        guards = self.catalog.guards(model.name)
        return MonitoredModel(
            model=model,
            guard=guards[-1].name if guards else "",
            config=read_config(self.catalog.store, model.name),
        )
