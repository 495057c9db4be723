"""The settings of the gateway, read from variables or a file."""

from pydantic import Field, FilePath

from services.runtime.settings import Settings


class GatewaySettings(Settings):
    """Settings of the gateway, in addition to those of every service."""

    corrector_url: str = Field("127.0.0.1:8013", description="HOST:PORT of the corrector.")
    generator_url: str = Field("127.0.0.1:8011", description="HOST:PORT of a generator.")
    distiller_url: str = Field("127.0.0.1:8012", description="HOST:PORT of the distiller.")
    tokens_file: FilePath | None = Field(
        None,
        description="Digests of callers' tokens (`python -m services.gateway.tokens` adds one), reloaded when it "
        "changes; callers must then show a token with a sufficient role.",
    )
    http_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of the HTTP server that takes CloudEvents of inference; 0: none is started.",
    )
    max_calls_per_s: float = Field(
        0,
        ge=0,
        description="Calls that one caller may make in a second, without those for inference; a second's worth at "
        "once. 0: any number.",
    )
    max_concurrent_calls: int = Field(
        256,
        ge=0,
        description="Calls of one caller that may be under way at the same time, streams included, without those for "
        "inference. 0: any number.",
    )
    max_message_bytes: int = Field(
        64 * 1024 * 1024,
        gt=0,
        description="Largest message that a caller may send, such as a request for inference.",
    )
    shared_memory: bool = Field(
        False,
        description="Let callers of this host share memory with Triton through the gateway: for a Triton on this "
        "host, where all users may read each other's memory.",
    )
    max_file_bytes: int = Field(8 * 1024**3, gt=0, description="Largest file that a client may upload or name by URL.")

    @property
    def knows_callers(self) -> bool:
        """Return whether callers are authenticated, by certificate or token."""
        return super().knows_callers or self.tokens_file is not None
