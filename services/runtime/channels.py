"""Channels to other servers: with TLS where the address says so, traced where traces are made."""

from typing import Any

import grpc
from defuse.tls import TlsFiles, open_channel

from services.runtime import tracing

UNLIMITED = -1


def channel_to(address: str, tls: TlsFiles, *, receive_bytes: int) -> Any:
    """Return an asyncio channel to HOST:PORT or grpcs://HOST:PORT that takes answers of so many bytes."""
    options = [("grpc.max_receive_message_length", receive_bytes), ("grpc.max_send_message_length", UNLIMITED)]
    return open_channel(grpc.aio, address, tls, options=options, interceptors=tracing.client_interceptors())
