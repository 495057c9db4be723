"""Events as KServe's payload logger sends them: request and response as CloudEvents, in either content mode."""

import base64
import json
import ssl
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import numpy.typing as npt
from defuse.v1 import model_pb2

from services.arrays import as_floats
from services.triton.preprocessing import preprocess

Array = npt.NDArray[Any]
TIMEOUT_S = 30
TYPES = {half: f"org.kubeflow.serving.inference.{half}" for half in ("request", "response")}


def request_of(images: Array, model: model_pb2.Model, *, flat: bool = True) -> dict[str, Any]:
    """Return a request for stored images as the Open Inference Protocol has it in JSON."""
    inputs = np.asarray(preprocess(as_floats(images), model))
    tensor = {"name": "image", "shape": list(inputs.shape), "datatype": "FP32"}
    return {"inputs": [{**tensor, "data": (inputs.ravel() if flat else inputs).tolist()}]}


def response_of(scores: Any, *, version: str = "3") -> dict[str, Any]:
    values = np.asarray(scores, np.float64)
    tensor = {"name": "logits", "shape": list(values.shape), "datatype": "FP32", "data": values.ravel().tolist()}
    return {"model_name": "tiny", "model_version": version, "outputs": [tensor]}


def attributes(event_id: str, half: str, **more: str) -> dict[str, str]:
    return {"specversion": "1.0", "id": event_id, "type": TYPES[half], "source": "http://localhost:9081/", **more}


def binary(said: dict[str, str], data: Any) -> tuple[dict[str, str], bytes]:
    """Return headers and body of an event in binary content mode."""
    headers = {f"Ce-{name.capitalize()}": value for name, value in said.items()}
    return {"Content-Type": "application/json", **headers}, json.dumps(data).encode()


def structured(said: dict[str, str], data: Any) -> tuple[dict[str, str], bytes]:
    """Return the same in structured content mode."""
    return {"Content-Type": "application/cloudevents+json; charset=UTF-8"}, json.dumps({**said, "data": data}).encode()


def structured_in_base64(said: dict[str, str], data: Any) -> tuple[dict[str, str], bytes]:
    """Return the same with its data as bytes."""
    encoded = base64.b64encode(json.dumps(data).encode()).decode()
    return {"Content-Type": "application/cloudevents+json"}, json.dumps({**said, "data_base64": encoded}).encode()


def post(url: str, headers: dict[str, str], body: bytes, *, context: ssl.SSLContext | None = None) -> tuple[int, Any]:
    """Return status and content of the answer."""
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
            return answer.status, None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]
