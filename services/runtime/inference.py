"""Triton over gRPC: several requests in flight, one preprocessing per classifier, errors that say what to do."""

import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from defuse import names
from defuse.errors import DefuseError, Internal, NotReady, Unavailable
from defuse.v1 import model_pb2
from tritonclient.utils import InferenceServerException

Array = npt.NDArray[Any]
# What Triton answers while it starts, stops, or is not there.
_AWAY = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
# In answers about a version that was unloaded, whose status is UNAVAILABLE too; never while one is loaded again.
_UNLOADED = "not at ready state"
# Probabilities below this are taken as this before their logarithm.
_LEAST_PROBABILITY = 1e-12


class InferenceClient:
    """A connection to one Triton server. Safe to use from several threads."""

    def __init__(self, url: str, *, timeout_s: float = 60.0, check_timeout_s: float = 5.0, in_flight: int = 4) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._check_timeout_s = check_timeout_s
        self._slots = threading.BoundedSemaphore(in_flight)
        self._client: Any = triton.InferenceServerClient(url)

    def check(self) -> None:
        """Raise Unavailable unless Triton answers.

        Asks whether it is live: readiness is false while any model is loaded or unloaded, which concerns nobody else.
        """
        try:
            live = self._client.is_server_live(client_timeout=self._check_timeout_s)
        except InferenceServerException as error:
            raise self._error(error) from error
        if not live:
            raise Unavailable(f"Triton at {self.url} is starting or stopping", reason="TRITON_UNAVAILABLE")

    def load(self, model_id: str) -> None:
        """Load or reload a model as its repository entry says; raise NotReady with Triton's words when it refuses."""
        try:
            self._client.load_model(model_id, client_timeout=self.timeout_s)
        except InferenceServerException as error:
            if isinstance(known := self._error(error), Unavailable):
                raise known from error
            words = error.message().partition("\n")[0]
            raise NotReady(
                f"Triton at {self.url} cannot load {model_id} ({words}); its log says more", reason="MODEL_NOT_READY"
            ) from error
        if not self._client.is_model_ready(model_id, client_timeout=self._check_timeout_s):
            raise NotReady(
                f"Triton loaded {model_id} but does not serve it; its log says why", reason="MODEL_NOT_READY"
            )

    def unload(self, model_id: str) -> None:
        try:
            self._client.unload_model(model_id, client_timeout=self.timeout_s)
        except InferenceServerException as error:
            raise self._error(error) from error

    def classifier(self, model: model_pb2.Model, *, version: int, model_id: str | None = None) -> "Classifier":
        """Return a model at a version; `model_id` where it is served under another name."""
        return Classifier(self, model, version=version, model_id=model_id or names.last(model.name))

    def infer(self, model_id: str, version: int, inputs: list[Any], output: str) -> "Future[Array]":
        """Send one request; wait first while too many are in flight."""
        answer: Future[Array] = Future()
        self._slots.acquire()

        def done(result: Any, error: InferenceServerException | None) -> None:
            self._slots.release()
            if error:
                answer.set_exception(self._error(error))
            else:
                answer.set_result(result.as_numpy(output))

        try:
            self._client.async_infer(
                model_id, inputs, callback=done, model_version=str(version), client_timeout=self.timeout_s
            )
        except InferenceServerException as error:
            self._slots.release()
            raise self._error(error) from error
        return answer

    def _error(self, error: InferenceServerException) -> DefuseError:
        text, status = error.message(), error.status()
        if status in _AWAY and _UNLOADED not in text:
            return Unavailable(
                f"Triton at {self.url} does not answer ({text}); start it or set DEFUSE_TRITON_URL",
                reason="TRITON_UNAVAILABLE",
            )
        if "not found" in text or "not ready" in text or _UNLOADED in text:
            return NotReady(
                f"Triton at {self.url} does not serve this model ({text}); load it, or name a version that is served",
                reason="MODEL_NOT_SERVED",
            )
        return Internal(f"Triton at {self.url} refused the request: {text}", reason="TRITON_REFUSED")


class Classifier:
    """One version of a classifier: images in [0, 1] in, logits out."""

    def __init__(self, client: InferenceClient, model: model_pb2.Model, *, version: int, model_id: str) -> None:
        self.model = model
        self.version = version
        self._model_id = model_id
        self._client = client

    def submit(self, images: Array) -> "PendingLogits":
        """Send images (n, c, h, w) in [0, 1], in as many requests as the model's batch size needs."""
        limit = self.model.fixed_batch_size or self.model.max_batch_size
        parts = [self._request(images[begin : begin + limit]) for begin in range(0, len(images), limit)]
        return PendingLogits(parts, self.model)

    def classify(self, images: Array) -> Array:
        """Return the logits (n, k) of images (n, c, h, w) in [0, 1]."""
        return self.submit(images).result()

    def classify_stored(self, images: Array, *, batch_size: int = 256) -> Array:
        """Return the logits (n, k) of stored images (n, h, w, c) uint8, a few batches ahead of the answers."""
        pending = [
            self.submit(as_floats(images[begin : begin + batch_size])) for begin in range(0, len(images), batch_size)
        ]
        return np.concatenate([part.result() for part in pending])

    def _request(self, images: Array) -> "tuple[Future[Array], int]":
        count = len(images)
        if self.model.fixed_batch_size > count:
            padding = np.repeat(images[-1:], self.model.fixed_batch_size - count, axis=0)
            images = np.concatenate([images, padding])  # (fixed_batch_size, c, h, w)
        array = preprocess(images, self.model)
        tensor = triton.InferInput(self.model.input_name, list(array.shape), self.model.input_datatype)
        tensor.set_data_from_numpy(array)
        return self._client.infer(self._model_id, self.version, [tensor], self.model.output_name), count


class PendingLogits:
    """Requests that are on their way."""

    def __init__(self, parts: "list[tuple[Future[Array], int]]", model: model_pb2.Model) -> None:
        self._parts = parts
        self._model = model

    def result(self) -> Array:
        """Wait for all answers; return logits (n, k), or log-probabilities where the model answers probabilities."""
        outputs = np.concatenate([future.result()[:count] for future, count in self._parts])
        if self._model.output == model_pb2.Model.OUTPUT_PROBABILITIES:
            outputs = np.log(np.maximum(outputs, _LEAST_PROBABILITY))
        return np.asarray(outputs, np.float32)


def as_floats(images: Array) -> Array:
    """Return stored images (n, h, w, c) uint8 as (n, c, h, w) float32 in [0, 1]."""
    floats = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    return np.asarray(floats / np.float32(255))


def as_stored(images: Array) -> Array:
    """Return images (n, c, h, w) in [0, 1] as they would be stored, (n, h, w, c) uint8."""
    return np.asarray(np.rint(np.clip(images, 0, 1) * 255), np.uint8).transpose(0, 2, 3, 1)


def preprocess(images: Array, model: model_pb2.Model) -> Array:
    """Return the classifier's input for images (n, c, h, w) in [0, 1], as the model declares it."""
    declared = model.preprocessing
    scaled = declared.low + images * np.float32(declared.high - declared.low)
    if declared.mean:
        mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (declared.mean, declared.std))
        scaled = (scaled - mean) / std
    if declared.layout == model_pb2.Preprocessing.LAYOUT_NHWC:
        scaled = scaled.transpose(0, 2, 3, 1)  # (n, h, w, c)
    if model.input_datatype == "UINT8":
        scaled = np.rint(np.clip(scaled, 0, 255))
    dtype = np.uint8 if model.input_datatype == "UINT8" else np.float32
    return np.ascontiguousarray(scaled, dtype=dtype)
