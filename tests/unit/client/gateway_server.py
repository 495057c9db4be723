"""Serves a fake gateway on this machine."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from defuse.connection import Connection
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc


@contextmanager
def connected(gateway: pb_grpc.GatewayServiceServicer) -> Iterator[Connection]:
    """Serve a fake gateway; provide a connection to it."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = Connection(f"127.0.0.1:{port}", timeout_s=60)
    try:
        yield connection
    finally:
        connection.close()
        server.stop(0).wait()
