"""TLS from PEM files, for addresses `grpcs://HOST:PORT`, and loopback addresses, which need none."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from defuse.errors import InvalidInput

SCHEME = "grpcs://"
_VARIABLES = {
    "certificate": "DEFUSE_TLS_CERTIFICATE",
    "key": "DEFUSE_TLS_KEY",
    "authority": "DEFUSE_TLS_AUTHORITY",
}


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files: certificate chain, private key, and trusted authorities.

    Without `authority` the system's authorities are trusted.
    """

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None

    @classmethod
    def of_environment(cls) -> Self:
        """Return the files that the environment names.

        The variables are `DEFUSE_TLS_CERTIFICATE`, `DEFUSE_TLS_KEY` and `DEFUSE_TLS_AUTHORITY`.
        """
        named = {part: os.environ.get(variable) for part, variable in _VARIABLES.items()}
        return cls(**{part: Path(path) for part, path in named.items() if path})

    def read(self, part: str) -> bytes | None:
        """Return the content of a file, or None.

        Raises InvalidInput if the file is unreadable.
        """
        path: Path | None = getattr(self, part)
        try:
            return path.read_bytes() if path else None
        except OSError as error:
            raise InvalidInput(f"{_VARIABLES[part]}: {path} cannot be read ({error.strerror})") from error

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials of a channel.

        Raises InvalidInput for unreadable files.
        """
        return grpc.ssl_channel_credentials(self.read("authority"), self.read("key"), self.read("certificate"))


def open_channel(api: Any, address: str, tls: TlsFiles, **options: Any) -> Any:
    """Return a channel of `grpc` or `grpc.aio`, with TLS for `grpcs://`."""
    if is_secure(address):
        return api.secure_channel(target_of(address), tls.channel_credentials(), **options)
    return api.insecure_channel(address, **options)


def is_secure(address: str) -> bool:
    """Return whether an address requires TLS."""
    return address.startswith(SCHEME)


def target_of(address: str) -> str:
    """Return HOST:PORT of an address."""
    return address.removeprefix(SCHEME)


def is_loopback(address: str) -> bool:
    """Return whether HOST or HOST:PORT is a loopback address.

    Unix sockets count as such. Names are not resolved, and only localhost counts.
    """
    if address.startswith("unix:"):
        return True
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """Return the host of HOST or HOST:PORT, also for IPv6 addresses."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]
