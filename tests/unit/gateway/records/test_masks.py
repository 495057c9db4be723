import pytest
from defuse.errors import InvalidInput
from defuse.v1 import correction_pb2, region_pb2, run_pb2, tensor_pb2
from google.protobuf.field_mask_pb2 import FieldMask

from services.gateway.records.paging import ReadMask

RUN = run_pb2.Run(
    name="runs/first",
    note="done",
    finished_shards=[0, 1],
    counts=run_pb2.SearchCounts(failures=7, decodes=100),
    config={"model": "models/tiny", "search": {"rounds": 3}},
)


def kept(*paths: str) -> run_pb2.Run:
    return ReadMask(run_pb2.Run, FieldMask(paths=paths)).of(RUN)


def test_nothing_named_is_everything() -> None:
    """Without a mask the resource is sent as it is."""
    assert kept() == RUN


def test_only_named_fields_are_sent() -> None:
    """Fields, lists, whole messages and fields within messages; unset fields stay unset."""
    assert kept("name", "finished_shards") == run_pb2.Run(name="runs/first", finished_shards=[0, 1])
    assert kept("counts.failures", "config.search") == run_pb2.Run(
        counts=run_pb2.SearchCounts(failures=7), config={"search": {"rounds": 3}}
    )
    assert kept("preflight", "error") == run_pb2.Run()
    assert RUN.note == "done"


@pytest.mark.parametrize("path", ["nam", "counts.nothing", "finished_shards.x", "name.x", "", "*"])
def test_unknown_fields(path: str) -> None:
    """A field that the resource does not have is refused with itself and those that it has."""
    with pytest.raises(InvalidInput) as caught:
        kept("name", path)
    assert f"names {path!r}, which a Run does not have; its fields are name, config, state" in caught.value.message
    assert caught.value.reason == "UNKNOWN_FIELD"


def test_every_kind() -> None:
    """Regions and corrections are cut in the same way."""
    region = region_pb2.Region(name="runs/first/regions/r1", error_rate=tensor_pb2.Estimate(value=0.5, trials=2))
    assert ReadMask(region_pb2.Region, FieldMask(paths=["error_rate.value"])).of(region) == region_pb2.Region(
        error_rate=tensor_pb2.Estimate(value=0.5)
    )
    correction = correction_pb2.Correction(name="runs/first/corrections/c1", note="waiting")
    assert ReadMask(correction_pb2.Correction, FieldMask(paths=["note"])).of(correction).name == ""
