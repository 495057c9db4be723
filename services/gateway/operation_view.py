"""Runs and corrections as google.longrunning.Operation: a view, nothing is kept beside the records."""

from defuse import names
from defuse.errors import Cancelled, DefuseError, Internal, NotReady, to_status
from defuse.v1 import correction_pb2, operation_pb2, run_pb2
from google.longrunning.operations_proto_pb2 import Operation

_Run, _Correction, _Metadata = run_pb2.Run, correction_pb2.Correction, operation_pb2.OperationMetadata
_RUN_STATES = {
    _Run.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Run.STATE_FAILED: _Metadata.STATE_FAILED,
    _Run.STATE_CANCELLED: _Metadata.STATE_CANCELLED,
}
_CORRECTION_STATES = {
    _Correction.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Correction.STATE_FAILED: _Metadata.STATE_FAILED,
    _Correction.STATE_CANCELLED: _Metadata.STATE_CANCELLED,
}


def of_run(run: run_pb2.Run) -> Operation:
    """Return the search of a run as an operation."""
    state = _RUN_STATES.get(run.state, _Metadata.STATE_RUNNING)
    return _operation(names.search_operation(run.name), run, "search", state)


def of_correction(correction: correction_pb2.Correction) -> Operation:
    """Return a correction as an operation."""
    state = _CORRECTION_STATES.get(correction.state, _Metadata.STATE_RUNNING)
    return _operation(names.correction_operation(correction.name), correction, "correct", state)


def _operation(
    name: str,
    record: run_pb2.Run | correction_pb2.Correction,
    verb: str,
    state: "operation_pb2.OperationMetadata.State.ValueType",
) -> Operation:
    operation = Operation(name=name, done=state != _Metadata.STATE_RUNNING)
    operation.metadata.Pack(
        _Metadata(
            target=record.name,
            verb=verb,
            state=state,
            progress=record.progress,
            note=record.note,
            create_time=record.create_time,
            update_time=record.update_time,
        )
    )
    if state == _Metadata.STATE_SUCCEEDED:
        operation.response.Pack(record)
    elif operation.done:
        operation.error.CopyFrom(to_status(_fault(record, state)))
    return operation


def _fault(
    record: run_pb2.Run | correction_pb2.Correction, state: "operation_pb2.OperationMetadata.State.ValueType"
) -> DefuseError:
    if state == _Metadata.STATE_CANCELLED:
        return Cancelled(f"{record.name} was cancelled")
    # What is no defect of ours says by its reason what stood in the way, as the stream of failures does.
    cls = Internal if record.error_reason in {"", "INTERNAL"} else NotReady
    return cls(record.error, reason=record.error_reason or None)
