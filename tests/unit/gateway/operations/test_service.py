from typing import Any

import pytest
from defuse.v1 import correction_pb2, operation_pb2, run_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2

from services.gateway.operations.service import of_correction, of_run

Run, Correction, Metadata = run_pb2.Run, correction_pb2.Correction, operation_pb2.OperationMetadata
CREATED, UPDATED = Timestamp(seconds=1000), Timestamp(seconds=2000)
SEARCH, CORRECTION = "runs/first/operations/search", "runs/first/operations/c1"


def run(state: "Run.State.ValueType", **fields: Any) -> run_pb2.Run:
    return Run(name="runs/first", state=state, create_time=CREATED, update_time=UPDATED, **fields)


def correction(state: "Correction.State.ValueType", **fields: Any) -> correction_pb2.Correction:
    return Correction(name="runs/first/corrections/c1", state=state, create_time=CREATED, update_time=UPDATED, **fields)


def metadata(operation: Any) -> operation_pb2.OperationMetadata:
    found = Metadata()
    assert operation.metadata.Unpack(found)
    return found


def reason(operation: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert operation.error.details[0].Unpack(info)
    assert info.domain == "defuse"
    return str(info.reason)


@pytest.mark.parametrize("state", [Run.STATE_PREPARING, Run.STATE_IDENTIFYING, Run.STATE_DISTILLING])
def test_a_search_under_way(state: "Run.State.ValueType") -> None:
    """It is not done, and its metadata say of what it is and how far."""
    operation = of_run(run(state, progress=0.25, note="round 2 of 8"))
    assert (operation.name, operation.done, operation.WhichOneof("result")) == (SEARCH, False, None)
    assert metadata(operation) == Metadata(
        target="runs/first",
        verb="search",
        state=Metadata.STATE_RUNNING,
        progress=0.25,
        note="round 2 of 8",
        create_time=CREATED,
        update_time=UPDATED,
    )


def test_what_succeeded_has_its_record_as_response() -> None:
    """The response is the run, or the correction, itself."""
    found, corrected = Run(), Correction()
    operation = of_run(run(Run.STATE_SUCCEEDED, region_count=3))
    assert operation.done
    assert operation.response.Unpack(found)
    assert found.region_count == 3
    operation = of_correction(correction(Correction.STATE_SUCCEEDED, base_version=7))
    assert (operation.name, operation.done) == (CORRECTION, True)
    assert operation.response.Unpack(corrected)
    assert corrected.base_version == 7
    assert (metadata(operation).verb, metadata(operation).target) == ("correct", "runs/first/corrections/c1")


@pytest.mark.parametrize(
    ("said", "code"),
    [("VAE_TOO_COARSE", code_pb2.FAILED_PRECONDITION), ("INTERNAL", code_pb2.INTERNAL), ("", code_pb2.INTERNAL)],
)
def test_what_failed_says_why(said: str, code: int) -> None:
    """A reason that the caller can act on is a precondition, anything else a defect; the sentence is the record's."""
    for operation in (
        of_run(run(Run.STATE_FAILED, error="mush", error_reason=said)),
        of_correction(correction(Correction.STATE_FAILED, error="mush", error_reason=said)),
    ):
        assert (operation.done, operation.error.code, operation.error.message) == (True, code, "mush")
        assert reason(operation) == (said or "INTERNAL")
        assert metadata(operation).state == Metadata.STATE_FAILED


def test_what_was_cancelled() -> None:
    """It is done with the error CANCELLED."""
    for operation in (of_run(run(Run.STATE_CANCELLED)), of_correction(correction(Correction.STATE_CANCELLED))):
        assert (operation.done, operation.error.code) == (True, code_pb2.CANCELLED)
        assert reason(operation) == "CANCELLED"
        assert metadata(operation).state == Metadata.STATE_CANCELLED
