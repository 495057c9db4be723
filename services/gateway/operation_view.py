"""Runs, corrections and releases as google.longrunning.Operation: a view, nothing is kept beside the records."""

from typing import Any, TypeAlias

from defuse import names
from defuse.errors import Cancelled, DefuseError, Internal, NotReady, to_status
from defuse.v1 import correction_pb2, operation_pb2, release_pb2, run_pb2
from google.longrunning.operations_proto_pb2 import Operation
from google.protobuf.message import Message

from services.gateway.publications import fault

_Run, _Correction, _Publication = run_pb2.Run, correction_pb2.Correction, release_pb2.Publication
_Metadata = operation_pb2.OperationMetadata
State: TypeAlias = "operation_pb2.OperationMetadata.State.ValueType"
_RUN_STATES = {
    _Run.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Run.STATE_FAILED: _Metadata.STATE_FAILED,
    _Run.STATE_CANCELLED: _Metadata.STATE_CANCELLED,
}
_PUBLICATION_STATES = {
    _Publication.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Publication.STATE_FAILED: _Metadata.STATE_FAILED,
}
_CORRECTION_STATES = {
    _Correction.STATE_SUCCEEDED: _Metadata.STATE_SUCCEEDED,
    _Correction.STATE_FAILED: _Metadata.STATE_FAILED,
    _Correction.STATE_CANCELLED: _Metadata.STATE_CANCELLED,
}


def of_run(run: run_pb2.Run) -> Operation:
    """Return the search of a run as an operation."""
    state = _RUN_STATES.get(run.state, _Metadata.STATE_RUNNING)
    operation = _operation(names.search_operation(run.name), run, state, target=run.name, verb="search")
    return _ended(operation, state, run, _fault(run))


def of_correction(correction: correction_pb2.Correction) -> Operation:
    """Return a correction as an operation."""
    state = _CORRECTION_STATES.get(correction.state, _Metadata.STATE_RUNNING)
    name = names.correction_operation(correction.name)
    operation = _operation(name, correction, state, target=correction.name, verb="correct")
    return _ended(operation, state, correction, _fault(correction))


def of_publication(publication: release_pb2.Publication) -> Operation:
    """Return a release as an operation."""
    state = _PUBLICATION_STATES.get(publication.state, _Metadata.STATE_RUNNING)
    name = names.publication_operation(publication.name)
    operation = _operation(name, publication, state, target=names.parent(publication.name), verb="release")
    return _ended(operation, state, publication.release, fault(publication))


def _operation(name: str, record: Any, state: State, *, target: str, verb: str) -> Operation:
    """Return an operation as long as it is under way."""
    operation = Operation(name=name)
    operation.metadata.Pack(
        _Metadata(
            target=target,
            verb=verb,
            state=state,
            progress=record.progress,
            note=record.note,
            create_time=record.create_time,
            update_time=record.update_time,
        )
    )
    return operation


def _ended(operation: Operation, state: State, response: Message, error: DefuseError) -> Operation:
    """Add how an operation ended, where it has."""
    operation.done = state != _Metadata.STATE_RUNNING
    if state == _Metadata.STATE_SUCCEEDED:
        operation.response.Pack(response)
    elif state == _Metadata.STATE_CANCELLED:
        operation.error.CopyFrom(to_status(Cancelled(f"{operation.name} was cancelled")))
    elif state == _Metadata.STATE_FAILED:
        operation.error.CopyFrom(to_status(error))
    return operation


def _fault(record: run_pb2.Run | correction_pb2.Correction) -> DefuseError:
    # What is no defect of ours says by its reason what stood in the way, as the stream of failures does.
    cls = Internal if record.error_reason in {"", "INTERNAL"} else NotReady
    return cls(record.error, reason=record.error_reason or None)
