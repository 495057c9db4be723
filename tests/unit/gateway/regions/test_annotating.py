import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from defuse.errors import DefuseError, NotReady, Unavailable
from defuse.v1 import annotation_pb2, distiller_service_pb2, region_pb2, run_pb2

from services.gateway.regions.regions import Annotator, Regions
from services.storage import keys
from services.storage.artifacts import ArtifactStore

R1 = "runs/first/regions/r1"
PARTS = [f"{R1}-1", f"{R1}-2"]
Answer = tuple[region_pb2.Region, list[region_pb2.Region]]


class Distiller:
    """Splits a region in two, once it is there; remembers what it was asked and what was annotated by then."""

    def __init__(self, store: ArtifactStore, refusal: DefuseError | None = None) -> None:
        self.refusal = refusal
        self.asked: list[str] = []
        self.annotated_before: list[bool] = []
        self._store = store

    async def call(self, method: Callable[..., Any]) -> Any:
        return await method(self, timeout=1.0)

    async def SplitRegion(  # noqa: N802  # gRPC's name
        self, request: distiller_service_pb2.SplitRegionRequest, **_: float
    ) -> distiller_service_pb2.SplitRegionResponse:
        self.asked.append(request.region)
        self.annotated_before.append(bool(self._store.keys(keys.annotations(request.region))))
        if self.refusal:
            raise self.refusal
        parts = [region_pb2.Region(name=name) for name in PARTS]
        self._store.write_message(keys.region_parts(request.region), region_pb2.Distillation(regions=parts))
        return distiller_service_pb2.SplitRegionResponse(parts=parts)


@pytest.fixture
def distiller(store: ArtifactStore) -> Distiller:
    """Leave a run with one region, and somebody who can split it."""
    store.write_message(keys.run("runs/first"), run_pb2.Run(name="runs/first"))
    store.write_message(keys.distillation("runs/first"), region_pb2.Distillation(regions=[region_pb2.Region(name=R1)]))
    return Distiller(store)


def annotate(store: ArtifactStore, distiller: Distiller, verdict: str, region: str = R1) -> Answer:
    annotation = annotation_pb2.Annotation(
        region=region, verdict=annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{verdict}")
    )
    annotator = Annotator(Regions(store), distiller)  # type: ignore[arg-type]
    found, parts = asyncio.run(annotator.annotate(annotation))
    return found, list(parts)


def verdict_of(store: ArtifactStore, region: str = R1) -> str:
    return annotation_pb2.Annotation.Verdict.Name(Regions(store).get(region).annotation.verdict)


def test_a_mixed_region_is_split(store: ArtifactStore, distiller: Distiller) -> None:
    """The annotation is stored before the distiller is called; the region and its parts are returned."""
    region, parts = annotate(store, distiller, "MIXED")
    assert region == Regions(store).get(R1)
    assert [part.name for part in parts] == PARTS
    assert (distiller.asked, distiller.annotated_before) == ([R1], [True])


@pytest.mark.parametrize("verdict", ["INVALID", "UNSURE"])
def test_other_verdicts_split_nothing(store: ArtifactStore, distiller: Distiller, verdict: str) -> None:
    """Nobody is asked, and there are no parts, also of a region that was mixed before."""
    annotate(store, distiller, "MIXED")
    region, parts = annotate(store, distiller, verdict)
    assert region.annotation.verdict == annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{verdict}")
    assert parts == []
    assert distiller.asked == [R1]


def test_what_was_said_of_parts_stays(store: ArtifactStore, distiller: Distiller) -> None:
    """A region that is called mixed once more has the parts that it had, with their verdicts."""
    annotate(store, distiller, "MIXED")
    annotate(store, distiller, "UNSURE", PARTS[0])
    _, parts = annotate(store, distiller, "MIXED")
    assert [part.HasField("annotation") for part in parts] == [True, False]


def test_a_distiller_that_is_away(store: ArtifactStore, distiller: Distiller) -> None:
    """The error says that the verdict is stored and what to do; the same verdict again completes it."""
    distiller.refusal = Unavailable("nothing answers at here:1", reason="AWAY")
    with pytest.raises(
        Unavailable, match=r"'r1' is annotated as mixed, but not split yet \(nothing answers.*annotate it again when"
    ) as caught:
        annotate(store, distiller, "MIXED")
    assert caught.value.reason == "AWAY"
    assert verdict_of(store) == "VERDICT_MIXED"
    distiller.refusal = None
    assert [part.name for part in annotate(store, distiller, "MIXED")[1]] == PARTS


def test_a_region_without_parts(store: ArtifactStore, distiller: Distiller) -> None:
    """The distiller's refusal is passed on in its words; the annotation is stored."""
    distiller.refusal = NotReady("nothing tells parts of region 'r1'", reason="NOT_SEPARABLE")
    with pytest.raises(NotReady, match="nothing tells parts of region 'r1'") as caught:
        annotate(store, distiller, "MIXED")
    assert caught.value.reason == "NOT_SEPARABLE"
    assert verdict_of(store) == "VERDICT_MIXED"
