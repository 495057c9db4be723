"""Lists and what is sent of their entries, as any gRPC client meets them, over a real gateway and Redis."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from defuse import names
from defuse.v1 import correction_pb2, model_pb2, region_pb2, release_pb2, run_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from google.protobuf.field_mask_pb2 import FieldMask

from services.gateway.records.paging import DEFAULT_SIZE
from services.storage import keys
from tests.gateway_process import Door, running_gateway

Run, Correction = run_pb2.Run, correction_pb2.Correction
TIMEOUT_S = 30
COUNT = 7
SIZES = pytest.mark.parametrize("size", [0, 1, 3, COUNT, COUNT + 1])


@pytest.fixture(scope="module")
def door(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), redis_server) as found:
        yield found


@pytest.fixture
def stub(door: Door, redis_url: str) -> Iterator[Any]:
    with grpc.insecure_channel(door.address) as channel:
        yield pb_grpc.GatewayServiceStub(channel)


def read(call: Any, request: Any, entries: str, between: Callable[[], None] = lambda: None) -> list[list[Any]]:
    """Return the entries of each page; `between` happens behind the first one."""
    pages = []
    while True:
        answer = call(request, timeout=TIMEOUT_S)
        pages.append(list(getattr(answer, entries)))
        if not answer.next_page_token:
            return pages
        request.page_token = answer.next_page_token
        if len(pages) == 1:
            between()


def named(pages: list[list[Any]]) -> list[str]:
    return [names.last(entry.name) for page in pages for entry in page]


def run(number: int, **fields: Any) -> run_pb2.Run:
    # Two of each moment, so that the order of names decides.
    return Run(name=f"runs/run-{number}", state=Run.STATE_SUCCEEDED, create_time={"seconds": number // 2}, **fields)


@SIZES
def test_runs_newest_first(door: Door, stub: Any, size: int) -> None:
    """Pages together are the list; a run that is created meanwhile does not shift what follows."""
    door.plant(*(run(number) for number in range(COUNT)))
    pages = read(stub.ListRuns, pb.ListRunsRequest(page_size=size), "runs", lambda: door.plant(run(90)))
    assert named(pages) == [f"run-{number}" for number in reversed(range(COUNT))]
    assert all(len(page) <= (size or DEFAULT_SIZE) for page in pages)


@SIZES
def test_corrections_oldest_first(door: Door, stub: Any, size: int) -> None:
    """One that is created meanwhile comes last."""
    door.plant(
        run(1),
        *(
            Correction(name=f"runs/run-1/corrections/c{number}", create_time={"seconds": number})
            for number in range(COUNT)
        ),
    )
    pages = read(stub.ListCorrections, pb.ListCorrectionsRequest(run="runs/run-1", page_size=size), "corrections")
    assert named(pages) == [f"c{number}" for number in range(COUNT)]


@SIZES
def test_models_and_releases(door: Door, stub: Any, size: int) -> None:
    """Models by name, releases oldest first."""
    for number in range(COUNT):
        name = f"models/model-{number}"
        door.store.write_message(keys.model(name), model_pb2.Model(name=name))
        for version in range(1, number + 2):
            release = release_pb2.Release(model=name, version=version)
            door.store.write_message(f"{keys.releases(name)}/{version}.pb", release)
    pages = read(stub.ListModels, pb.ListModelsRequest(page_size=size), "models")
    assert named(pages) == [f"model-{number}" for number in range(COUNT)]
    pages = read(
        stub.ListReleases, pb.ListReleasesRequest(model=f"models/model-{COUNT - 1}", page_size=size), "releases"
    )
    assert [release.version for page in pages for release in page] == list(range(1, COUNT + 1))


@SIZES
def test_regions_by_score(door: Door, stub: Any, size: int) -> None:
    """The largest score comes first, equal ones by name; only requested fields are sent."""
    door.plant(run(1))
    door.store.write_message(keys.run("runs/run-1"), run(1))
    regions = [
        region_pb2.Region(name=f"runs/run-1/regions/r{number}", score=number // 2, true_label="ant")
        for number in range(COUNT)
    ]
    door.store.write_message(keys.distillation("runs/run-1"), region_pb2.Distillation(regions=regions))
    request = pb.ListRegionsRequest(run="runs/run-1", page_size=size, read_mask=FieldMask(paths=["name"]))
    pages = read(stub.ListRegions, request, "regions")
    assert named(pages) == ["r6", "r4", "r5", "r2", "r3", "r0", "r1"]
    assert {entry.true_label for page in pages for entry in page} == {""}


def test_what_is_sent_of_a_resource(door: Door, stub: Any) -> None:
    """Named fields alone, of one or of a list; a field that there is not is refused with its name."""
    door.plant(run(1, note="done", progress=1.0), Correction(name="runs/run-1/corrections/c1", note="waiting"))
    mask = FieldMask(paths=["note"])
    assert stub.GetRun(pb.GetRunRequest(name="runs/run-1", read_mask=mask), timeout=TIMEOUT_S).run == Run(note="done")
    [listed] = stub.ListRuns(pb.ListRunsRequest(read_mask=mask), timeout=TIMEOUT_S).runs
    assert listed == Run(note="done")
    request = pb.GetCorrectionRequest(name="runs/run-1/corrections/c1", read_mask=mask)
    assert stub.GetCorrection(request, timeout=TIMEOUT_S).correction == Correction(note="waiting")
    [corrected] = stub.ListCorrections(
        pb.ListCorrectionsRequest(run="runs/run-1", read_mask=mask), timeout=TIMEOUT_S
    ).corrections
    assert corrected == Correction(note="waiting")
    for call, request in (
        (stub.ListRuns, pb.ListRunsRequest(read_mask=FieldMask(paths=["colour"]))),
        (stub.GetRegion, pb.GetRegionRequest(name="runs/a/regions/r1", read_mask=FieldMask(paths=["colour"]))),
    ):
        with pytest.raises(grpc.RpcError, match="'colour'") as refused:
            call(request, timeout=TIMEOUT_S)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_client_reads_all_pages(door: Door, redis_url: str) -> None:
    """A list has everything, however many pages it takes."""
    door.plant(*(run(number) for number in range(DEFAULT_SIZE + 5)))
    with door.client() as client:
        assert len({found.id for found in client.runs()}) == DEFAULT_SIZE + 5
