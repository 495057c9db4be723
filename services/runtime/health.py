"""`python -m services.runtime.health`: the health check of the local service."""

import os
import sys

import grpc
from defuse.tls import SCHEME, TlsFiles, open_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

_CHECK_S = 2.0


def is_healthy(address: str, tls: TlsFiles) -> bool:
    """Return whether the service at an address and its dependencies answer."""
    with open_channel(grpc, address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_CHECK_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> None:
    """Exit with status 0 when this host's service is healthy, else 1.

    The service listens at `DEFUSE_PORT`. The command reads environment variables without the settings classes, because
    it is started every few seconds.
    """
    tls = TlsFiles.of_environment()
    scheme = SCHEME if tls.certificate else ""
    sys.exit(not is_healthy(f"{scheme}localhost:{os.environ['DEFUSE_PORT']}", tls))


if __name__ == "__main__":
    main()
