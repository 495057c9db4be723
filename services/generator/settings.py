"""Settings of the generator."""

from pydantic import Field

from services.dependencies import TransportSettings


class GeneratorSettings(TransportSettings):
    """What the generator needs beyond every service's settings."""

    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="`cuda` if there is one, else `cpu`."
    )
    threads: int = Field(0, ge=0, description="Threads of torch on the CPU; 0 leaves the choice to torch.")
    triton_requests_in_flight: int = Field(4, ge=1, description="Requests sent to Triton before an answer is awaited.")
