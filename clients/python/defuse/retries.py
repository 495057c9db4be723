"""Calls that are made again: those of which the contract says that twice is as good as once."""

import json

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

_REPEATABLE = (MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT)
# Google's contract does not say it; to delete twice is an error.
_OPERATIONS = [
    {"service": "google.longrunning.Operations", "method": method}
    for method in ("GetOperation", "ListOperations", "WaitOperation", "CancelOperation")
]
# Four attempts within some two seconds: a server that restarts is waited for, one that is gone is not.
_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def service_config(*services: ServiceDescriptor) -> str:
    """Return the service config of a channel, by which gRPC repeats those single calls that may be repeated.

    They are those of the services, and those of their operations.
    """
    repeated = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if method.GetOptions().idempotency_level in _REPEATABLE
        and not method.client_streaming
        and not method.server_streaming
    ]
    return json.dumps({"methodConfig": [{"name": repeated + _OPERATIONS, "retryPolicy": _POLICY}]})
