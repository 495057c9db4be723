"""Creates that are asked again, over a real gateway that may die in between."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from defuse.v1 import annotation_pb2, model_pb2, region_pb2, release_pb2, run_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc

from services.gateway.regions.regions import Regions
from services.storage import keys
from tests.gateway_process import Door, running_gateway

TIMEOUT_S = 30
REGION = "runs/first/regions/r1"


@pytest.fixture
def door(redis_url: str, tmp_path: Path) -> Iterator[Door]:
    with running_gateway(tmp_path, redis_url) as found:
        yield found


@pytest.fixture
def stub(door: Door) -> Iterator[Any]:
    with grpc.insecure_channel(door.address) as channel:
        yield pb_grpc.GatewayServiceStub(channel)


def uploaded_file(stub: Any) -> str:
    """Upload ten images; return the digest of their file."""
    file = io.BytesIO()
    np.savez(file, x_train=np.zeros((10, 8, 8), np.uint8), y_train=np.arange(10) % 2)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    stub.UploadFile(iter([pb.UploadFileRequest(digest=digest, chunk=file.getvalue())]), timeout=TIMEOUT_S)
    return digest


def verdict(label: str, request_id: str) -> pb.AnnotateRegionRequest:
    annotation = annotation_pb2.Annotation(
        region=REGION, verdict=annotation_pb2.Annotation.VERDICT_LABEL, label=label, annotator="ada"
    )
    return pb.AnnotateRegionRequest(annotation=annotation, request_id=request_id)


def test_the_same_answer(stub: Any) -> None:
    """The same request with the same id gets the answer of the first; another request with it is refused."""
    request = pb.CreateDatasetRequest(file_digest=uploaded_file(stub), display_name="mine", request_id="one")
    first = stub.CreateDataset(request, timeout=TIMEOUT_S)
    assert stub.CreateDataset(request, timeout=TIMEOUT_S) == first
    request.seed = 7
    with pytest.raises(grpc.RpcError, match="'one' was used for another request") as refused:
        stub.CreateDataset(request, timeout=TIMEOUT_S)
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    request.request_id = "two"
    assert stub.CreateDataset(request, timeout=TIMEOUT_S).dataset.name != first.dataset.name


def test_what_was_said_stays_said(door: Door, redis_url: str, tmp_path: Path, stub: Any) -> None:
    """An annotation that is retried at another gateway is stored once: later annotations still count."""
    region = region_pb2.Region(name=REGION, true_label="ant")
    store = door.store
    store.write_message("models/tiny/model.pb", model_pb2.Model(name="models/tiny", classes=["ant", "bee"]))
    store.write_message("models/tiny/releases/1.pb", release_pb2.Release(model="models/tiny", version=1))
    store.write_message(keys.run("runs/first"), run_pb2.Run(name="runs/first", config={"model": "models/tiny"}))
    store.write_message(keys.distillation("runs/first"), region_pb2.Distillation(regions=[region]))
    first = stub.AnnotateRegion(verdict("bee", "one"), timeout=TIMEOUT_S)
    stub.AnnotateRegion(verdict("ant", "two"), timeout=TIMEOUT_S)
    with running_gateway(tmp_path, redis_url) as other, grpc.insecure_channel(other.address) as channel:
        again = pb_grpc.GatewayServiceStub(channel)
        assert again.AnnotateRegion(verdict("bee", "one"), timeout=TIMEOUT_S) == first
    assert Regions(store).get(REGION).annotation.label == "ant"
