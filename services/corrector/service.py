"""CorrectorService: converts calls and delegates them."""

import asyncio
from typing import Any

import grpc
from defuse.errors import NotReady
from defuse.v1 import corrector_service_pb2 as pb
from defuse.v1 import corrector_service_pb2_grpc as pb_grpc

from services.corrector.external_triton import AnyReleases
from services.corrector.gate.comparison import ServedCandidate
from services.corrector.gate.decision import Gate
from services.corrector.guard.builder import GuardIssuer
from services.corrector.publishing import succeeded_correction
from services.corrector.release_history import ChangeAuthor
from services.storage import keys
from services.storage.artifacts import ArtifactStore

Context = grpc.aio.ServicerContext[Any, Any]


class CorrectorService(pb_grpc.CorrectorServiceServicer):
    """The gRPC service for changes to Triton that bypass the queue."""

    def __init__(self, store: ArtifactStore, releases: AnyReleases, gate: Gate, guards: GuardIssuer) -> None:
        self._store = store
        self._releases = releases
        self._gate = gate
        self._guards = guards

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.RegisterModelResponse:
        author = ChangeAuthor(request_id=request.request_id)
        model = await asyncio.to_thread(self._releases.register, request.model, request.file_digest, author)
        return pb.RegisterModelResponse(model=model)

    async def RunGate(self, request: pb.RunGateRequest, context: Context) -> pb.RunGateResponse:
        verdict = await asyncio.to_thread(
            self._gate.judge_file, request.model, request.file_digest, dataset=request.dataset
        )
        return pb.RunGateResponse(verdict=verdict)

    async def RestorePrevious(self, request: pb.RestorePreviousRequest, context: Context) -> pb.RestorePreviousResponse:
        author = ChangeAuthor(actor=request.actor, reason=request.reason, request_id=request.request_id)
        release = await asyncio.to_thread(self._releases.restore_previous, request.model, author)
        return pb.RestorePreviousResponse(release=release)

    async def ServeCandidate(self, request: pb.ServeCandidateRequest, context: Context) -> pb.ServeCandidateResponse:
        candidate = await asyncio.to_thread(self._serve_candidate, request)
        return pb.ServeCandidateResponse(candidate=candidate.name, version=candidate.version)

    async def WithdrawCandidates(
        self, request: pb.WithdrawCandidatesRequest, context: Context
    ) -> pb.WithdrawCandidatesResponse:
        await asyncio.to_thread(self._releases.withdraw_candidates, request.model)
        return pb.WithdrawCandidatesResponse()

    async def IssueGuard(self, request: pb.IssueGuardRequest, context: Context) -> pb.IssueGuardResponse:
        guard = await asyncio.to_thread(self._guards.requested, request)
        return pb.IssueGuardResponse(guard=guard)

    def _serve_candidate(self, request: pb.ServeCandidateRequest) -> ServedCandidate:
        correction = succeeded_correction(self._store, request.correction)
        model = self._releases.history.check_publishable(correction)
        if request.answers_callers:
            self._gate.require_passed(correction, approver=request.approver, reason=request.reason)
        candidate = self._releases.serve_candidate(model, self._store.read_bytes(keys.corrected_file(correction.name)))
        if not candidate.name:
            raise NotReady(
                f"{correction.name} has no candidate in Triton, which is not ours to write; its operator may try it",
                reason="TRITON_ADOPTED",
            )
        return candidate
