"""What takes long, as it stands."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from google.rpc import error_details_pb2

from defuse import names
from defuse.v1 import correction_pb2, operation_pb2, release_pb2, run_pb2
from defuse.values.correction import Correction
from defuse.values.model import Release
from defuse.values.plain import moment, word
from defuse.values.run import Run


@dataclass(frozen=True, kw_only=True)
class OperationStatus:
    """A search, a correction or a release. `verb` is search, correct or release, `state` running, succeeded, failed or
    cancelled.
    """

    # `runs/{run}/operations/{operation}`, or `models/{model}/operations/{operation}`
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
    result: Run | Correction | Release | None
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
    def parent(self) -> str:
        """Return what it belongs to: `runs/{run}`, or `models/{model}` of a release."""
        return names.parent(self.name)

    @property
    def ended(self) -> bool:
        return self.state != "running"


def _result(message: Any) -> Run | Correction | Release:
    run, correction, release = run_pb2.Run(), correction_pb2.Correction(), release_pb2.Release()
    if message.response.Unpack(run):
        return Run.from_proto(run)
    if message.response.Unpack(correction):
        return Correction.from_proto(correction)
    message.response.Unpack(release)
    return Release.from_proto(release)


def _reason(message: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in message.error.details:
        detail.Unpack(info)
    return str(info.reason)
