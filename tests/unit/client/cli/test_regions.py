"""`defuse regions` and `defuse annotate` with a fake gateway."""

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from defuse import tensors
from defuse.cli import app
from defuse.v1 import annotation_pb2, region_pb2, tensor_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from PIL import Image
from typer.testing import CliRunner, Result

CONTENT = bytes(range(256)) * 20


def region(run: str, rank: int | str, *, predicted: str = "bee") -> region_pb2.Region:
    return region_pb2.Region(
        name=f"runs/{run}/regions/r{rank}",
        true_label="ant",
        predicted_label=predicted,
        size=40,
        score=0.125,
        stability=0.875,
        error_rate=tensor_pb2.Estimate(value=0.5, low=0.4, high=0.6, successes=50, trials=100),
        real_error_rate=tensor_pb2.Estimate(value=0.25, low=0.1, high=0.5, successes=3, trials=12),
        suggested_label="ant",
        nearest=[region_pb2.RealImage(index=7, label="ant", predicted_label="ant")],
        nearest_misclassified=[region_pb2.RealImage(index=9, label="ant", predicted_label="wasp")],
    )


class Gateway(pb_grpc.GatewayServiceServicer):
    """Breaks the first download after two messages."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.parts: list[region_pb2.Region] = []
        self.seconds_left = 0.0

    def ListRegions(self, request: pb.ListRegionsRequest, context: Any) -> pb.ListRegionsResponse:  # noqa: N802  # gRPC's name
        return pb.ListRegionsResponse(regions=[region("a-run", 1), *self.parts])

    def AnnotateRegion(self, request: pb.AnnotateRegionRequest, context: Any) -> pb.AnnotateRegionResponse:  # noqa: N802
        self.seconds_left = context.time_remaining()
        whole = region("a-run", 1)
        whole.annotation.CopyFrom(request.annotation)
        if request.annotation.verdict == annotation_pb2.Annotation.VERDICT_MIXED:
            self.parts = [
                region("a-run", "1-1"),
                region("a-run", "1-2"),
                region("a-run", "1-2-1"),
                region("a-run", "11"),
            ]
        return pb.AnnotateRegionResponse(region=whole, parts=self.parts[:2])

    def GetRegion(self, request: pb.GetRegionRequest, context: Any) -> pb.GetRegionResponse:  # noqa: N802
        images = tensors.images_to_proto(np.zeros((3, 8, 8, 1), np.uint8))
        one = tensors.images_to_proto(np.full((1, 8, 8, 1), 200, np.uint8))
        return pb.GetRegionResponse(
            region=region("a-run", 1), exemplars=images, sources=images, nearest=one, nearest_misclassified=one
        )

    def DiffRegions(self, request: pb.DiffRegionsRequest, context: Any) -> pb.DiffRegionsResponse:  # noqa: N802
        assert (request.before, request.after) == ("runs/a-run", "runs/b-run")
        kept = [
            region_pb2.RegionPair(before=region("a-run", 2), after=region("b-run", 2), shift_sd=0.125),
            region_pb2.RegionPair(before=region("a-run", 3), after=region("b-run", 4), shift_sd=0.75, moved=True),
        ]
        diff = region_pb2.RegionsDiff(
            added=[region("b-run", 1, predicted="cow")], gone=[region("a-run", 1, predicted="dog")], kept=kept
        )
        return pb.DiffRegionsResponse(diff=diff)

    def ExportRegions(self, request: pb.ExportRegionsRequest, context: Any) -> Iterator[pb.ExportRegionsResponse]:  # noqa: N802
        self.offsets.append(request.offset)
        for begin in range(request.offset, len(CONTENT), 1000):
            if len(self.offsets) == 1 and begin == 2000:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield pb.ExportRegionsResponse(data=CONTENT[begin : begin + 1000])


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Serve the fake gateway at the default address of the command line."""
    found = Gateway()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GatewayServiceServicer_to_server(found, server)
    monkeypatch.setenv("DEFUSE_GATEWAY", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("COLUMNS", "160")
    server.start()
    yield found
    server.stop(0).wait()


def defuse(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.usefixtures("gateway")
def test_list() -> None:
    """The table has every figure of a region, and states its order."""
    output = defuse("regions", "list", "a-run").output
    for text in ("0.125", "0.500 [0.400, 0.600]", "3 of 12", "0.88", "largest score first"):
        assert text in output
    [found] = json.loads(defuse("regions", "list", "a-run", "--json").output)
    assert found["nearest_misclassified"] == [
        {"index": 9, "label": "ant", "predicted_label": "wasp", "distance_sd": 0.0}
    ]
    assert found["novelty_sd"] is None


@pytest.mark.usefixtures("gateway")
def test_contact_sheet(tmp_path: Path) -> None:
    """The sheet has rows of failures, sources, and nearest training images."""
    sheet = tmp_path / "sheet.png"
    defuse("regions", "show", "a-run", "r1", "--out", sheet)
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("L"))
    column = pixels[:, 40]
    assert [(column == shade).sum() > 80 for shade in (0, 200)] == [True, True]
    light_rows = (pixels[:, 20:60] == 200).all(axis=1)  # text has such pixels, too, but no such rows
    assert light_rows.sum() == 2 * 84


@pytest.mark.usefixtures("gateway")
def test_diff() -> None:
    """Each region is a line with its ids in both runs.

    JSON has whole regions.
    """
    lines = [line.split() for line in defuse("regions", "diff", "a-run", "b-run").output.splitlines()]
    row_by_kind = {line[1]: line for line in lines if len(line) > 3 and line[1] in ("new", "gone", "moved", "same")}
    assert set(row_by_kind) == {"new", "gone", "moved", "same"}
    assert "cow" in row_by_kind["new"]
    assert "dog" in row_by_kind["gone"]
    assert {"r3", "r4", "0.75"} <= set(row_by_kind["moved"])
    whole = json.loads(defuse("regions", "diff", "a-run", "b-run", "--json").output)
    assert [whole["added"][0]["id"], whole["gone"][0]["id"], whole["kept"][1]["moved"]] == ["r1", "r1", True]


def test_annotate_mixed_region(gateway: Gateway) -> None:
    """Only the region's own parts are printed.

    The deadline allows for the split.
    """
    found = json.loads(defuse("annotate", "a-run", "r1", "--verdict", "mixed", "--json").output)
    assert [(one["id"], one["state"]) for one in found] == [("r1", "mixed"), ("r1-1", "open"), ("r1-2", "open")]
    assert gateway.seconds_left > 100
    words = defuse("annotate", "a-run", "r1", "--verdict", "mixed").output.split()
    assert {"r1", "r1-1", "r1-2"} <= set(words)
    assert "r11" not in words
    [only] = json.loads(defuse("annotate", "a-run", "r1", "--verdict", "invalid", "--json").output)
    assert (only["id"], only["state"]) == ("r1", "invalid")
    assert gateway.seconds_left < 100


def test_export_resumes(gateway: Gateway, tmp_path: Path) -> None:
    """The file is complete, each byte once, although the stream broke."""
    file = tmp_path / "regions.safetensors"
    assert json.loads(defuse("regions", "export", "a-run", "--out", file, "--json").output) == {"file": str(file)}
    assert file.read_bytes() == CONTENT
    assert gateway.offsets == [0, 2000]
