"""Settings of every service.

They are read from `DEFUSE_*` variables or a TOML file, and validated at start.
"""

import os
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn, Self

from defuse.tls import TlsFiles, is_loopback
from pydantic import Field, FilePath, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

PREFIX = "DEFUSE_"
# A chunk of images with its envelope; larger content is streamed.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
# Most bytes of local copies of a remote store's arrays.
STORE_COPIES_BYTES = 8 * 2**30


class Settings(BaseSettings):
    """Settings of every service.

    Variables override the file that `DEFUSE_SETTINGS_FILE` names.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, validate_default=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(0, ge=0, le=65535, description="Port of the gRPC server; 0 takes a free one.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of the Prometheus metrics; 0 takes a free one.")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis server with append-only file and noeviction.")
    triton_url: str = Field(
        "127.0.0.1:8001", description="HOST:PORT of Triton's gRPC API; `grpcs://HOST:PORT` where it listens with TLS."
    )
    store_url: str = Field("file:///var/lib/defuse/store", description="fsspec URL of the artifact store.")
    store_copies_bytes: int = Field(
        STORE_COPIES_BYTES,
        gt=0,
        description="Most bytes of copies, in `TMPDIR`, of a remote store's arrays; the least recently used go first.",
    )
    claim_after_s: float = Field(
        15.0, gt=0, description="Seconds without a heartbeat after which the message of a dead worker is reclaimed."
    )
    dependency_timeout_s: float = Field(
        5.0, gt=0, description="Seconds that Redis or Triton may take to answer a check."
    )
    tls_certificate: FilePath | None = Field(
        None, description="Certificate chain (PEM), read again when it changes; with it the service listens with TLS."
    )
    tls_key: FilePath | None = Field(None, description="Private key (PEM) of the certificate.")
    tls_authority: FilePath | None = Field(
        None,
        description="Trusted certificates (PEM); callers must then show a certificate signed by one of them (mTLS).",
    )
    allow_anonymous: bool = Field(
        False,
        description="Listen beyond this host (`DEFUSE_HOST`) without authentication: for private networks, where every "
        "user may do everything.",
    )
    otlp_url: str | None = Field(
        None,
        description="OpenTelemetry collector (`http://HOST:PORT`, OTLP over gRPC) for traces; unset: none are made.",
    )
    max_message_bytes: int = Field(MAX_MESSAGE_BYTES, gt=0, description="Largest message that a caller may send.")
    default_deadline_s: float = Field(
        3600.0, gt=0, description="Seconds after which a single call that came without a deadline ends."
    )
    drain_s: float = Field(10.0, ge=0, description="Seconds that calls in flight are given when the service stops.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Least level that is logged.")
    log_format: str = Field("json", pattern="^(json|text)$", description="`json` for machines, `text` for people.")

    @field_validator("tls_key")
    @classmethod
    def _with_its_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if (key is None) is not (info.data.get("tls_certificate") is None):
            raise ValueError(f"{PREFIX}TLS_CERTIFICATE and {PREFIX}TLS_KEY are given together or not at all")
        return key

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Self:
        if not (is_loopback(self.host) or self.knows_callers or self.allow_anonymous):
            raise ValueError(
                f"{PREFIX}HOST: anyone who reaches {self.host} could do everything; require certificates "
                f"({PREFIX}TLS_AUTHORITY) or, at the gateway, tokens ({PREFIX}TOKENS_FILE), listen on 127.0.0.1, or "
                f"declare the network private ({PREFIX}ALLOW_ANONYMOUS=true)"
            )
        return self

    @property
    def knows_callers(self) -> bool:
        """Return whether callers are authenticated."""
        return self.tls_authority is not None

    @property
    def tls(self) -> TlsFiles:
        """Return the files that the `tls_*` settings name."""
        return TlsFiles(certificate=self.tls_certificate, key=self.tls_key, authority=self.tls_authority)

    @classmethod
    def load(cls) -> Self:
        """Read the settings.

        Exits with one line for each invalid setting, by the variable's name.
        """
        try:
            return cls()
        except ValidationError as error:
            report_and_exit(error)
        except tomllib.TOMLDecodeError as error:
            sys.stderr.write(
                f"{PREFIX}SETTINGS_FILE: {os.environ[f'{PREFIX}SETTINGS_FILE']} is no TOML file: {error}\n"
            )
            sys.exit(2)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get(f"{PREFIX}SETTINGS_FILE")
        if file and not Path(file).is_file():
            sys.stderr.write(f"{PREFIX}SETTINGS_FILE: there is no file {file!r}\n")
            sys.exit(2)
        toml: tuple[Any, ...] = (TomlConfigSettingsSource(settings_cls, Path(file)),) if file else ()
        return (sources["init_settings"], sources["env_settings"], *toml)


def report_and_exit(error: ValidationError) -> NoReturn:
    """Exit with one line for each invalid setting, by the variable's name."""
    for fault in error.errors():
        if not fault["loc"]:  # an error of several settings names them itself
            sys.stderr.write(f"{fault['ctx']['error']}\n")
            continue
        name = PREFIX + "_".join(str(part) for part in fault["loc"]).upper()
        sys.stderr.write(f"{name}: {fault['msg']} (got {fault['input']!r})\n")
    sys.exit(2)
