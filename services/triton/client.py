"""The client of Triton over gRPC.

It maps images in [0, 1] to logits, with one preprocessing for each classifier.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from defuse import names
from defuse.errors import NotReady, Unavailable
from defuse.tls import TlsFiles, is_secure, target_of
from defuse.v1 import model_pb2
from tritonclient.utils import InferenceServerException

from services.arrays import Array, as_floats
from services.triton.in_flight import RequestsInFlight, TransportChoice
from services.triton.preprocessing import input_shape, no_logits, preprocess
from services.triton.transport import AUTO, Request, TransportSetting, to_defuse_error

# Lower bound of probabilities before their logarithm.
LEAST_PROBABILITY = 1e-12
_LOGIT_BYTES = 4
# Time for requests under way when a process ends; their callers are gone.
_CLOSE_GRACE_S = 2.0


class InferenceClient:
    """A connection to one Triton server.

    The constructor opens no connection. The client is safe to use from several threads.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        check_timeout_s: float = 5.0,
        in_flight: int = 4,
        transport: TransportSetting = AUTO,
        tls: TlsFiles | None = None,
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._check_timeout_s = check_timeout_s
        self._client: Any = _connected(url, tls or TlsFiles())
        self._choice = TransportChoice(transport, self._client, url, timeout_s=check_timeout_s)
        self._in_flight = RequestsInFlight(self._client, self._choice, url, count=in_flight, timeout_s=timeout_s)
        # Also at exit: shared memory would outlive the process.
        self._closing = weakref.finalize(self, _close, self._in_flight, self._client)

    @property
    def transport(self) -> str:
        """Return the name of the transport in use.

        The transport is chosen now if no image was sent yet. Raises Unavailable while Triton does not answer, or when
        it refuses the requested transport.
        """
        return self._choice.name()

    def close(self) -> None:
        """Release the memory shared with Triton and close the connection.

        It is also called when the process ends.
        """
        self._closing()

    def check(self) -> None:
        """Raise Unavailable unless Triton answers.

        The check is for liveness, because readiness is false while any model is loaded or unloaded.
        """
        try:
            live = self._client.is_server_live(client_timeout=self._check_timeout_s)
        except InferenceServerException as error:
            raise to_defuse_error(error, self.url) from error
        if not live:
            raise Unavailable(f"Triton at {self.url} is starting or stopping", reason="TRITON_UNAVAILABLE")

    def load(self, model_id: str) -> None:
        """Load or reload a model from its repository entry.

        Raises NotReady with Triton's message when Triton refuses.
        """
        try:
            self._client.load_model(model_id, client_timeout=self.timeout_s)
        except InferenceServerException as error:
            if isinstance(known := to_defuse_error(error, self.url), Unavailable):
                raise known from error
            words = error.message().partition("\n")[0]
            raise NotReady(
                f"Triton at {self.url} cannot load {model_id} ({words}); see its log", reason="MODEL_NOT_READY"
            ) from error
        if not self._client.is_model_ready(model_id, client_timeout=self._check_timeout_s):
            raise NotReady(f"Triton loaded {model_id} but does not serve it; see its log", reason="MODEL_NOT_READY")

    def unload(self, model_id: str) -> None:
        try:
            self._client.unload_model(model_id, client_timeout=self.timeout_s)
        except InferenceServerException as error:
            raise to_defuse_error(error, self.url) from error

    def versions(self, model_id: str) -> list[int]:
        """Return the served versions of a model, ascending.

        Raises NotReady when there are none.
        """
        return sorted(int(version) for version in self._described("get_model_metadata", model_id).versions)

    def max_batch_size(self, model_id: str) -> int:
        """Return the largest batch of a model, 0 without batching."""
        return int(self._described("get_model_config", model_id).config.max_batch_size)

    def _described(self, what: str, model_id: str) -> Any:
        try:
            return getattr(self._client, what)(model_id, client_timeout=self._check_timeout_s)
        except InferenceServerException as error:
            raise to_defuse_error(error, self.url) from error

    def classifier(self, model: model_pb2.Model, *, version: int, model_id: str | None = None) -> "Classifier":
        """Return a version of a model as a classifier.

        `model_id` is the name under which it is served, by default the model's own.
        """
        return Classifier(self, model, version=version, model_id=model_id or names.last(model.name))

    def infer(self, request: Request, images: Any, write: Callable[[Any, Any], None]) -> "Future[Array]":
        """Send one request, whose input `write(images, input)` fills.

        It waits while too many requests are in flight.
        """
        return self._in_flight.send(request, images, write)


def _connected(url: str, tls: TlsFiles) -> Any:
    if not is_secure(url):
        return triton.InferenceServerClient(url)
    return triton.InferenceServerClient(target_of(url), ssl=True, creds=tls.channel_credentials())


def _close(in_flight: RequestsInFlight, client: Any) -> None:
    in_flight.close(_CLOSE_GRACE_S)
    client.close()


class Classifier:
    """One version of a classifier, from images in [0, 1] to logits."""

    served = True

    def __init__(self, client: InferenceClient, model: model_pb2.Model, *, version: int, model_id: str) -> None:
        self.model = model
        self.version = version
        self._model_id = model_id
        self._client = client

    def submit(self, images: Any) -> "PendingLogits":
        """Send images (n, c, h, w) in [0, 1], and return pending logits.

        They are sent in as many requests as the model's batch size needs. Images are a numpy array or an object with
        DLPack support, such as a torch tensor on a CUDA device; they may be changed once this method returns. It waits
        while too many requests are in flight, from any caller.
        """
        limit = self.model.fixed_batch_size or self.model.max_batch_size
        parts = [self._request(images[begin : begin + limit]) for begin in range(0, len(images), limit)]
        return PendingLogits(parts, self)

    def classify(self, images: Any) -> Array:
        """Return the logits (n, k) of images (n, c, h, w) in [0, 1]."""
        return self.submit(images).result()

    def classify_stored(self, images: Array, *, batch_size: int = 256) -> Array:
        """Return the logits (n, k) of stored images (n, h, w, c) uint8.

        Batches are sent before the first answer is awaited.
        """
        pending = [
            self.submit(as_floats(images[begin : begin + batch_size])) for begin in range(0, len(images), batch_size)
        ]
        return np.concatenate([no_logits(self.model), *(part.result() for part in pending)])

    def _request(self, images: Any) -> "tuple[Future[Array], int]":
        count, model = len(images), self.model
        rows = model.fixed_batch_size or count
        request = Request(
            model_id=self._model_id,
            version=self.version,
            input_name=model.input_name,
            datatype=model.input_datatype,
            shape=input_shape((rows, *images.shape[1:]), model),
            output_name=model.output_name,
            output_bytes=rows * len(model.classes) * _LOGIT_BYTES,
        )
        return self._client.infer(request, images, self._write), count

    def _write(self, images: Any, out: Any) -> None:
        """Write the input of a request.

        A fixed batch size is filled up with the last image.
        """
        count = len(images)
        preprocess(images, self.model, out=out[:count])
        out[count:] = out[count - 1]


class PendingLogits:
    """The logits of requests under way."""

    def __init__(self, parts: "list[tuple[Future[Array], int]]", classifier: Classifier) -> None:
        self._parts = parts
        self._classifier = classifier  # keeps the client, whose deletion would end the requests

    def result(self) -> Array:
        """Wait for all answers and return the logits (n, k).

        They are log-probabilities for a model that returns probabilities.
        """
        model = self._classifier.model
        outputs = np.concatenate([no_logits(model), *(future.result()[:count] for future, count in self._parts)])
        if model.output == model_pb2.Model.OUTPUT_PROBABILITIES:
            outputs = np.log(np.maximum(outputs, LEAST_PROBABILITY))
        return np.asarray(outputs, np.float32)
