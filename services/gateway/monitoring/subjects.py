"""What must be known of a model whenever something of it is reported."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from defuse.v1 import model_pb2, monitor_pb2

from services.gateway.monitoring import config
from services.storage.catalog import Catalog

# How soon a new guard or another configuration is known.
_KNOWN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is watched."""

    model: model_pb2.Model
    # Name of its newest guard; empty where it has none.
    guard: str
    config: monitor_pb2.MonitorConfig


# Is told of a model and of a batch whose observations, or what is known of them, were changed.
Told = Callable[[Subject, str], Awaitable[None]]


class Subjects:
    """Reads models from the store, each at most once a second."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._known: dict[str, tuple[float, Subject]] = {}

    async def of(self, model_name: str) -> Subject:
        """Return a model; raise NotFound for an unknown name."""
        now = time.monotonic()
        read_at, subject = self._known.get(model_name, (-_KNOWN_S, None))
        if subject is None or now - read_at >= _KNOWN_S:
            subject = await asyncio.to_thread(self._read, model_name)
            self._known[model_name] = (now, subject)
        return subject

    def forget(self, model_name: str) -> None:
        """Have a model read anew, of which this gateway has just changed something."""
        self._known.pop(model_name, None)

    def _read(self, model_name: str) -> Subject:
        model = self.catalog.model(model_name)
        guards = self.catalog.guards(model.name)
        return Subject(
            model=model,
            guard=guards[-1].name if guards else "",
            config=config.read(self.catalog.store, model.name),
        )
