"""The setting of services that send images to Triton."""

from pydantic import Field

from services.runtime.settings import Settings
from services.triton.transport import AUTO, Wanted


class TransportSettings(Settings):
    """What a service that classifies needs beyond every service's settings."""

    triton_transport: Wanted = Field(
        AUTO,
        description="How images reach Triton: `grpc`, `system-shared-memory` (one host, one /dev/shm) or "
        "`cuda-shared-memory` (one GPU); `auto` takes the fastest that works.",
    )
