"""Wait for a run's search with Google's own stubs, as a program in any language would."""

import os

import grpc
from defuse.v1.operation_pb2 import OperationMetadata
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.longrunning.operations_proto_pb2 import WaitOperationRequest

request = WaitOperationRequest(name="runs/first/operations/search")
request.timeout.FromSeconds(10)
metadata = OperationMetadata()
with grpc.insecure_channel(os.environ["DEFUSE_GATEWAY"]) as channel:
    operation = OperationsStub(channel).WaitOperation(request)
    while not operation.done:
        operation.metadata.Unpack(metadata)
        print(f"{metadata.progress:.0%}", metadata.note)
        operation = OperationsStub(channel).WaitOperation(request)
print("failed:" if operation.HasField("error") else "done", operation.error.message)
