"""Settings of the corrector."""

from pathlib import Path

from pydantic import Field

from services.dependencies import TransportSettings


class CorrectorSettings(TransportSettings):
    """What the corrector needs beyond every service's settings."""

    triton_repository: Path = Field(
        Path("/var/lib/defuse/models"), description="Triton's model repository; the corrector is its one writer."
    )
    handover: Path | None = Field(
        None,
        description="Directory in which releases are handed over where Triton's repository is somebody else's; unset "
        "where it is ours to write.",
    )
    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="`cuda` if there is one, else `cpu`."
    )
    threads: int = Field(0, ge=0, description="Threads of torch on the CPU; 0 leaves the choice to torch.")
    torch_factories: str = Field(
        "",
        description="Modules, or `module:function`s, separated by commas, that a correction may name as torch factory: "
        "they run as code in the corrector.",
    )

    @property
    def factories(self) -> list[str]:
        """The entries of `torch_factories`."""
        return [entry.strip() for entry in self.torch_factories.split(",") if entry.strip()]
