"""CorrectorService: translates and delegates."""

import asyncio
from typing import Any

import grpc
from defuse import names
from defuse.errors import NotFound, NotReady
from defuse.v1 import correction_pb2, release_pb2
from defuse.v1 import corrector_service_pb2 as pb
from defuse.v1 import corrector_service_pb2_grpc as pb_grpc

from services.corrector.adopted import AnyReleases
from services.corrector.gate.judge import Gate
from services.corrector.gate.version import Candidate
from services.corrector.guard.issuing import Guards
from services.corrector.history import Decision
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore

Context = grpc.aio.ServicerContext[Any, Any]


class CorrectorService(pb_grpc.CorrectorServiceServicer):
    """What changes the Triton repository at once."""

    def __init__(self, store: ArtifactStore, releases: AnyReleases, gate: Gate, guards: Guards) -> None:
        self._store = store
        self._releases = releases
        self._gate = gate
        self._guards = guards

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.RegisterModelResponse:
        decision = Decision(request_id=request.request_id)
        model = await asyncio.to_thread(self._releases.register, request.model, request.file_digest, decision)
        return pb.RegisterModelResponse(model=model)

    async def RunGate(self, request: pb.RunGateRequest, context: Context) -> pb.RunGateResponse:
        verdict = await asyncio.to_thread(
            self._gate.judge_file, request.model, request.file_digest, dataset=request.dataset
        )
        return pb.RunGateResponse(verdict=verdict)

    async def PublishCorrection(
        self, request: pb.PublishCorrectionRequest, context: Context
    ) -> pb.PublishCorrectionResponse:
        return pb.PublishCorrectionResponse(release=await asyncio.to_thread(self._publish, request))

    async def RestorePrevious(self, request: pb.RestorePreviousRequest, context: Context) -> pb.RestorePreviousResponse:
        decision = Decision(actor=request.actor, reason=request.reason, request_id=request.request_id)
        release = await asyncio.to_thread(self._releases.restore_previous, request.model, decision)
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
        guard = await asyncio.to_thread(self._guards.issue, request.run, request.false_alarm_rate)
        return pb.IssueGuardResponse(guard=guard)

    def _serve_candidate(self, request: pb.ServeCandidateRequest) -> Candidate:
        correction = self._finished(request.correction)
        model = self._releases.history.check_publishable(correction)
        if request.answers_callers:
            self._gate.admit(correction, approver=request.approver, reason=request.reason)
        candidate = self._releases.serve_candidate(
            model, self._store.read_bytes(catalog.corrected_file(correction.name))
        )
        if not candidate.name:
            raise NotReady(
                f"{correction.name} has no candidate in Triton, which is not ours to write; its operator may try it",
                reason="TRITON_ADOPTED",
            )
        return candidate

    def _publish(self, request: pb.PublishCorrectionRequest) -> release_pb2.Release:
        correction = self._finished(request.correction)
        if made := self._releases.history.made(correction.model, request.request_id):
            return made
        self._releases.history.check_publishable(correction)
        verdict = self._gate.admit(correction, approver=request.approver, reason=request.reason)
        decision = Decision(
            actor=request.actor,
            reason=request.reason,
            verdict=verdict.name,
            approver="" if verdict.passed else request.approver,
            request_id=request.request_id,
        )
        release = self._releases.publish(correction, decision)
        self._guards.renew(names.parent(correction.name))
        return release

    def _finished(self, name: str) -> correction_pb2.Correction:
        key = catalog.correction(names.check(name, "runs/*/corrections/*"))
        try:
            return self._store.read_message(key, correction_pb2.Correction)
        except NotFound as error:
            raise NotReady(
                f"{name} is not finished, or failed; only a finished correction can be released",
                reason="CORRECTION_NOT_FINISHED",
            ) from error
