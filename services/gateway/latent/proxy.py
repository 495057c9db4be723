"""The reverse proxy of GeneratorService.

Calls are forwarded as bytes after their role was checked.
"""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from defuse.errors import from_rpc_error
from defuse.tls import TlsFiles
from defuse.v1 import generator_service_pb2

from services.gateway.access import roles
from services.runtime.settings import MAX_MESSAGE_BYTES
from services.runtime.tls import channel_to

SERVICE = generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"]


class GeneratorProxy(grpc.GenericRpcHandler):
    """Proxies GeneratorService to a generator, with deadlines and cancellation."""

    def __init__(self, url: str, tls: TlsFiles) -> None:
        self._url = url
        self._channel = channel_to(url, tls, receive_bytes=MAX_MESSAGE_BYTES)
        self._handlers = {
            path: self._handler(path, SERVICE.methods_by_name[path.rpartition("/")[2]])
            for path in roles.contract_roles(SERVICE)
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the handler of a method; None for methods of other services."""
        return self._handlers.get(handler_call_details.method)

    async def close(self) -> None:
        await self._channel.close()

    def _handler(self, path: str, method: Any) -> "grpc.RpcMethodHandler[Any, Any]":
        if not method.server_streaming:

            async def unary(request: bytes, context: Any) -> bytes:
                try:
                    answer: bytes = await self._channel.unary_unary(path)(request, timeout=context.time_remaining())
                except grpc.aio.AioRpcError as error:
                    raise from_rpc_error(error, address=self._url) from error
                return answer

            return grpc.unary_unary_rpc_method_handler(unary)

        async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            if role := roles.required_role_of_call(path, request):
                roles.require(role, f"{method.name} with cancel_run")
            call = self._channel.unary_stream(path)(request, timeout=context.time_remaining())
            try:
                async for answer in call:
                    yield answer
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, address=self._url) from error
            finally:
                call.cancel()  # a disconnected caller also ends the work behind the stream

        return grpc.unary_stream_rpc_method_handler(stream)
