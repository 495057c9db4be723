"""Fake servers: a gateway that accepts reports, and an inference server."""

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from defuse.errors import InvalidInput, to_status
from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from services.localstack.child_process import free_port

MODEL = "tiny"
CLASSES = 3


class Gateway(pb_grpc.MonitorServiceServicer):
    """Keeps observations, each id once, and their truths.

    It refuses the next calls with `codes`, and a batch because of an id that begins with `bad`.
    """

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.codes: list[grpc.StatusCode] = []
        # Calls block while this is clear.
        self.responding = threading.Event()
        self.responding.set()
        self.calls: list[str] = []
        self.batches: dict[str, list[str]] = {}
        self.sizes: list[int] = []
        self.stored: dict[str, tuple[str, monitor_pb2.Observation]] = {}
        self.truths: dict[str, str] = {}
        self._server: grpc.Server | None = None
        self._lock = threading.Lock()

    def Report(self, requests: Iterator[pb.ReportRequest], context: Any) -> pb.ReportResponse:  # noqa: N802  # gRPC's name
        messages = list(requests)
        self._ready("Report", context)
        if about := self._first_bad(messages):
            refused = InvalidInput(f"{about!r} has a bad image", metadata={"id": about})
            context.abort_with_status(rpc_status.to_status(to_status(refused)))
        observations = [observation for message in messages for observation in message.observations]
        batch = messages[0].batch_id
        with self._lock:
            self.sizes += [message.ByteSize() for message in messages]
            if batch not in self.batches:
                self.batches[batch] = [one.id for one in observations if one.id not in self.stored]
                self.stored |= {
                    one.id: (messages[0].model, one) for one in observations if one.id in self.batches[batch]
                }
            return pb.ReportResponse(stored=len(self.batches[batch]))

    def AttachTruth(self, request: pb.AttachTruthRequest, context: Any) -> pb.AttachTruthResponse:  # noqa: N802
        self._ready("AttachTruth", context)
        if "no class" in request.truths.values():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no class of the model's")
        known = {id_: label for id_, label in request.truths.items() if id_ in self.stored}
        self.truths |= known
        return pb.AttachTruthResponse(attached=len(known))

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_MonitorServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def kill(self) -> None:
        """Abort every call."""
        if self._server:
            self._server.stop(0).wait()
        self._server = None

    def observation(self, observation_id: str) -> monitor_pb2.Observation:
        return self.stored[observation_id][1]

    def _first_bad(self, messages: list[pb.ReportRequest]) -> str:
        ids = [observation.id for message in messages for observation in message.observations]
        return next((id_ for id_ in ids if id_.startswith("bad")), "")

    def _ready(self, method: str, context: Any) -> None:
        with self._lock:
            self.calls.append(method)
            code = self.codes.pop(0) if self.codes else None
        self.responding.wait(30)
        if code:
            context.abort(code, "planted")


class Classifier(oip_grpc.GRPCInferenceServiceServicer):
    """Responds with scores that count up.

    Image `row` has the scores 3 row, 3 row + 1, 3 row + 2. Requests for the model `broken` fail.
    """

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.responses: list[bytes] = []
        self.typed = False

    def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:  # noqa: N802
        if request.model_name == "broken":
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        count = request.inputs[0].shape[0]
        scores = np.arange(count * CLASSES, dtype="<f4").reshape(count, CLASSES)
        response = oip.ModelInferResponse(model_name=request.model_name, model_version="7", id=request.id)
        tensor = response.outputs.add(name="scores", datatype="FP32", shape=scores.shape)
        if self.typed:
            tensor.contents.fp32_contents.extend(scores.ravel().tolist())
        else:
            response.raw_output_contents.append(scores.tobytes())
        self.requests.append(request.SerializeToString(deterministic=True))
        self.responses.append(response.SerializeToString(deterministic=True))
        return response

    def ServerLive(self, request: oip.ServerLiveRequest, context: Any) -> oip.ServerLiveResponse:  # noqa: N802
        return oip.ServerLiveResponse(live=True)


@contextmanager
def running_classifier(classifier: Classifier) -> Iterator[str]:
    """Serve a classifier; provide its address."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(classifier, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def infer_request(
    request_id: str = "", count: int = 1, *, model: str = MODEL, value: float = 0.0
) -> oip.ModelInferRequest:
    """Return a request with images (2, 2) that count up from `value`."""
    images = value + np.arange(count * 4, dtype="<f4").reshape(count, 1, 2, 2)
    request = oip.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[images.tobytes()])
    request.inputs.add(name="image", datatype="FP32", shape=images.shape)
    return request
