"""What takes long, as it stands."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from google.rpc import error_details_pb2

from defuse import names
from defuse.v1 import correction_pb2, operation_pb2, run_pb2
from defuse.values.correction import Correction
from defuse.values.plain import moment, word
from defuse.values.run import Run


@dataclass(frozen=True, kw_only=True)
class OperationStatus:
    """A search or a correction. `verb` is search or correct, `state` running, succeeded, failed or cancelled."""

    # `runs/{run}/operations/{operation}`
    name: str
    verb: str
    state: str
    # Share of the present stage of a search, or of a whole correction, that is done.
    progress: float
    note: str
    error: str
    # The error for programs, for instance VAE_TOO_COARSE.
    error_reason: str
    # What it gave; None until it has succeeded.
    result: Run | Correction | None
    create_time: datetime
    update_time: datetime

    @classmethod
    def from_proto(cls, message: Any) -> Self:
        """Return what a google.longrunning.Operation says."""
        metadata = operation_pb2.OperationMetadata()
        message.metadata.Unpack(metadata)
        return cls(
            name=message.name,
            verb=metadata.verb,
            state=word(operation_pb2.OperationMetadata.State.Name(metadata.state), "STATE"),
            progress=metadata.progress,
            note=metadata.note,
            error=message.error.message,
            error_reason=_reason(message),
            result=_result(message) if message.HasField("response") else None,
            create_time=moment(metadata.create_time),
            update_time=moment(metadata.update_time),
        )

    @property
    def run(self) -> str:
        """Return the id of its run."""
        return names.last(names.parent(self.name))

    @property
    def ended(self) -> bool:
        return self.state != "running"


def _result(message: Any) -> Run | Correction:
    run, correction = run_pb2.Run(), correction_pb2.Correction()
    if message.response.Unpack(run):
        return Run.from_proto(run)
    message.response.Unpack(correction)
    return Correction.from_proto(correction)


def _reason(message: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in message.error.details:
        detail.Unpack(info)
    return str(info.reason)
