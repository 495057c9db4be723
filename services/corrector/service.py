"""CorrectorService: translates and delegates."""

import asyncio
from typing import Any

import grpc
from defuse import names
from defuse.errors import NotFound, NotReady
from defuse.v1 import correction_pb2
from defuse.v1 import corrector_service_pb2 as pb
from defuse.v1 import corrector_service_pb2_grpc as pb_grpc

from services.corrector.release import Releases
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore

Context = grpc.aio.ServicerContext[Any, Any]


class CorrectorService(pb_grpc.CorrectorServiceServicer):
    """What changes the Triton repository at once."""

    def __init__(self, store: ArtifactStore, releases: Releases) -> None:
        self._store = store
        self._releases = releases

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.RegisterModelResponse:
        model = await asyncio.to_thread(self._releases.register, request.model, request.file_digest)
        return pb.RegisterModelResponse(model=model)

    async def PublishCorrection(
        self, request: pb.PublishCorrectionRequest, context: Context
    ) -> pb.PublishCorrectionResponse:
        correction = await asyncio.to_thread(self._finished, request.correction)
        release = await asyncio.to_thread(self._releases.publish, correction)
        return pb.PublishCorrectionResponse(release=release)

    async def RestorePrevious(self, request: pb.RestorePreviousRequest, context: Context) -> pb.RestorePreviousResponse:
        release = await asyncio.to_thread(self._releases.restore_previous, request.model)
        return pb.RestorePreviousResponse(release=release)

    def _finished(self, name: str) -> correction_pb2.Correction:
        key = catalog.correction(names.check(name, "runs/*/corrections/*"))
        try:
            return self._store.read_message(key, correction_pb2.Correction)
        except NotFound as error:
            raise NotReady(
                f"{name} is not finished, or failed; only a finished correction can be released",
                reason="CORRECTION_NOT_FINISHED",
            ) from error
