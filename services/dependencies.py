"""The dependencies of a service, made from its settings.

They are the queue, the Triton client, the artifact store and the torch device.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field

from services.runtime.queue import Queue
from services.runtime.server import Check
from services.runtime.settings import Settings
from services.storage.artifacts import ArtifactStore
from services.triton.client import InferenceClient
from services.triton.transport import AUTO, GRPC, TransportSetting

# The gateway has no torch.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """Redis, Triton and the artifact store of a service.

    The constructor opens no connection.
    """

    queue: Queue
    inference: InferenceClient
    store: ArtifactStore

    @classmethod
    def of(cls, settings: Settings, *, in_flight: int = 4) -> Self:
        timeout_s = settings.dependency_timeout_s
        inference = InferenceClient(
            settings.triton_url,
            check_timeout_s=timeout_s,
            in_flight=in_flight,
            tls=settings.tls,
            # A service without this setting sends no images.
            transport=settings.triton_transport if isinstance(settings, TransportSettings) else GRPC,
        )
        return cls(
            queue=Queue(settings.redis_url, claim_after_s=settings.claim_after_s, timeout_s=timeout_s),
            inference=inference,
            store=ArtifactStore(settings.store_url, copies_bytes=settings.store_copies_bytes),
        )

    @property
    def checks(self) -> Mapping[str, Check]:
        """Return the health checks of all dependencies."""
        return {
            "redis": self.queue.check,
            "triton": lambda: asyncio.to_thread(self.inference.check),
            "store": lambda: asyncio.to_thread(self.store.check),
        }


class TransportSettings(Settings):
    """Settings of services that classify, in addition to those of every service."""

    triton_transport: TransportSetting = Field(
        AUTO,
        description="How images reach Triton: `grpc`, `system-shared-memory` (one host, one /dev/shm) or "
        "`cuda-shared-memory` (one GPU); `auto` takes the fastest that works.",
    )


def device_of(setting: str) -> "torch.device":
    """Return the torch device of a setting.

    `auto` is `cuda` when there is one, else `cpu`.
    """
    import torch

    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def limit_threads(count: int) -> None:
    """Limit torch to a number of threads.

    With 0, torch chooses the number.
    """
    import torch

    if count:
        torch.set_num_threads(count)
