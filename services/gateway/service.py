"""GatewayService: converts calls of the public API and delegates them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from defuse import tensors
from defuse.v1 import (
    correction_pb2,
    corrector_service_pb2_grpc,
    distiller_service_pb2,
    distiller_service_pb2_grpc,
    generator_service_pb2,
    generator_service_pb2_grpc,
    region_pb2,
    run_pb2,
)
from defuse.v1 import (
    gateway_service_pb2 as pb,
)
from defuse.v1 import (
    gateway_service_pb2_grpc as pb_grpc,
)
from defuse.version import VERSION

from services.gateway.access.roles import sign_request
from services.gateway.audit.audit_log import AuditLog
from services.gateway.corrections.corrections import Corrections
from services.gateway.datasets.datasets import Datasets
from services.gateway.files.files import Files
from services.gateway.guards.guards import Guards
from services.gateway.models.models import Models
from services.gateway.records.idempotency import IdempotentRequests, idempotent
from services.gateway.records.paging import Cursor, ReadMask
from services.gateway.regions.regions import Annotator, Regions
from services.gateway.releases.releases import ReleaseOperations
from services.gateway.runs.config import ThresholdAdvisor
from services.gateway.runs.runs import Runs
from services.gateway.trials.trials import Trials
from services.runtime.queue import SCHEMA
from services.runtime.tls import ServiceClient
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class GatewayContext:
    """The objects that GatewayService delegates to."""

    store: ArtifactStore
    files: Files
    datasets: Datasets
    requests: IdempotentRequests
    runs: Runs
    regions: Regions
    annotator: Annotator
    threshold_advisor: ThresholdAdvisor
    corrections: Corrections
    publications: ReleaseOperations
    trials: Trials
    audit_log: AuditLog
    models: Models
    guards: Guards
    corrector: "ServiceClient[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]"
    distiller: "ServiceClient[distiller_service_pb2_grpc.DistillerServiceAsyncStub]"
    generator: "ServiceClient[generator_service_pb2_grpc.GeneratorServiceAsyncStub]"

    async def close(self) -> None:
        """Close the connections to the other services."""
        for peer in (self.corrector, self.distiller, self.generator):
            await peer.close()


class GatewayService(pb_grpc.GatewayServiceServicer):
    """The gRPC service of the public API."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self.requests = context.requests
        self._catalog = Catalog(context.store)

    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(version=VERSION, schema=SCHEMA)

    async def UploadFile(
        self, request_iterator: AsyncIterator[pb.UploadFileRequest], context: Context
    ) -> pb.UploadFileResponse:
        digest, size = await self._context.files.upload(request_iterator)
        return pb.UploadFileResponse(digest=digest, size=size)

    async def GetFile(self, request: pb.GetFileRequest, context: Context) -> pb.GetFileResponse:
        return pb.GetFileResponse(size=await asyncio.to_thread(self._context.files.size, request.digest))

    @idempotent
    async def CreateModel(self, request: pb.CreateModelRequest, context: Context) -> pb.CreateModelResponse:
        return pb.CreateModelResponse(model=await self._context.models.register(request))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=await self._context.models.get(request.name))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        page = await self._context.models.page(Cursor.of(request))
        return pb.ListModelsResponse(models=page.entries, next_page_token=page.next_page_token)

    async def ListReleases(self, request: pb.ListReleasesRequest, context: Context) -> pb.ListReleasesResponse:
        page = await self._context.models.releases_page(request.model, Cursor.of(request, request.model))
        return pb.ListReleasesResponse(releases=page.entries, next_page_token=page.next_page_token)

    async def JudgeCandidate(self, request: pb.JudgeCandidateRequest, context: Context) -> pb.JudgeCandidateResponse:
        verdict = await self._context.models.judge(request, deadline_s=context.time_remaining())
        return pb.JudgeCandidateResponse(verdict=verdict)

    async def GetVerdict(self, request: pb.GetVerdictRequest, context: Context) -> pb.GetVerdictResponse:
        return pb.GetVerdictResponse(verdict=await self._context.models.verdict(request.name))

    @idempotent
    async def RollbackModel(self, request: pb.RollbackModelRequest, context: Context) -> pb.RollbackModelResponse:
        sign_request(request)
        return pb.RollbackModelResponse(release=await self._context.models.roll_back(request))

    @idempotent
    async def CreateGuard(self, request: pb.CreateGuardRequest, context: Context) -> pb.CreateGuardResponse:
        guard = await self._context.guards.create(request, deadline_s=context.time_remaining())
        return pb.CreateGuardResponse(guard=guard)

    async def GetGuard(self, request: pb.GetGuardRequest, context: Context) -> pb.GetGuardResponse:
        return pb.GetGuardResponse(guard=await self._context.guards.get(request.name))

    async def ListGuards(self, request: pb.ListGuardsRequest, context: Context) -> pb.ListGuardsResponse:
        page = await self._context.guards.page(request.model, Cursor.of(request, request.model))
        return pb.ListGuardsResponse(guards=page.entries, next_page_token=page.next_page_token)

    @idempotent
    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: Context) -> pb.CreateDatasetResponse:
        dataset = await asyncio.to_thread(
            self._context.datasets.create,
            file_digest=request.file_digest,
            uri=request.uri,
            display_name=request.display_name,
            seed=request.seed,
        )
        return pb.CreateDatasetResponse(dataset=dataset)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        return pb.GetDatasetResponse(dataset=await asyncio.to_thread(self._catalog.dataset, request.name))

    @idempotent
    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        return pb.CreateRunResponse(run=await self._context.runs.create(request.run_id, request.config))

    async def EstimateRun(self, request: pb.EstimateRunRequest, context: Context) -> pb.EstimateRunResponse:
        wanted = generator_service_pb2.EstimateRequest(config=await self._context.runs.checked(request.config))
        answer = await self._context.generator.call(lambda stub, **how: stub.Estimate(wanted, **how))
        return pb.EstimateRunResponse(estimate=answer.estimate)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        mask = ReadMask(run_pb2.Run, request.read_mask)
        return pb.GetRunResponse(run=mask.of(await self._context.runs.get(request.name)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        mask = ReadMask(run_pb2.Run, request.read_mask)
        page = await self._context.runs.page(Cursor.of(request))
        return pb.ListRunsResponse(runs=map(mask.of, page.entries), next_page_token=page.next_page_token)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        async for run in self._context.runs.watch(request.name):
            yield pb.WatchRunResponse(run=run)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> pb.CancelRunResponse:
        return pb.CancelRunResponse(run=await self._context.runs.cancel(request.name))

    async def AdviseValidity(self, request: pb.AdviseValidityRequest, context: Context) -> pb.AdviseValidityResponse:
        run = await self._context.runs.get_distilled(request.run)
        return pb.AdviseValidityResponse(advice=await self._context.threshold_advisor.of(run))

    async def ListRegions(self, request: pb.ListRegionsRequest, context: Context) -> pb.ListRegionsResponse:
        mask, cursor = ReadMask(region_pb2.Region, request.read_mask), Cursor.of(request, request.run)
        run = await self._context.runs.get_distilled(request.run)
        page, counts = await asyncio.to_thread(self._context.regions.page, run, cursor)
        return pb.ListRegionsResponse(
            regions=map(mask.of, page.entries), counts=counts, next_page_token=page.next_page_token
        )

    async def GetRegion(self, request: pb.GetRegionRequest, context: Context) -> pb.GetRegionResponse:
        mask = ReadMask(region_pb2.Region, request.read_mask)
        region = mask.of(await asyncio.to_thread(self._context.regions.get, request.name))
        pictures = await asyncio.to_thread(self._context.regions.pictures, request.name)
        return pb.GetRegionResponse(
            region=region,
            exemplars=tensors.images_to_proto(pictures.exemplars),
            sources=tensors.images_to_proto(pictures.sources),
            nearest=tensors.images_to_proto(pictures.nearest),
            nearest_misclassified=tensors.images_to_proto(pictures.nearest_misclassified),
        )

    async def SampleRegionImages(
        self, request: pb.SampleRegionImagesRequest, context: Context
    ) -> pb.SampleRegionImagesResponse:
        wanted = distiller_service_pb2.SampleRegionRequest(
            region=request.region, count=request.count, seed=request.seed
        )
        answer = await self._context.distiller.call(lambda stub, **how: stub.SampleRegion(wanted, **how))
        return pb.SampleRegionImagesResponse(images=answer.images)

    async def DiffRegions(self, request: pb.DiffRegionsRequest, context: Context) -> pb.DiffRegionsResponse:
        for name in (request.before, request.after):
            await self._context.runs.get_distilled(name)
        wanted = distiller_service_pb2.CompareRegionsRequest(before=request.before, after=request.after)
        answer = await self._context.distiller.call(lambda stub, **how: stub.CompareRegions(wanted, **how))
        return pb.DiffRegionsResponse(diff=answer.diff)

    async def ExportRegions(
        self, request: pb.ExportRegionsRequest, context: Context
    ) -> AsyncIterator[pb.ExportRegionsResponse]:
        run = await self._context.runs.get_distilled(request.run)
        for part in await asyncio.to_thread(self._context.regions.export_from, run, request.offset):
            yield pb.ExportRegionsResponse(data=part)

    @idempotent
    async def AnnotateRegion(self, request: pb.AnnotateRegionRequest, context: Context) -> pb.AnnotateRegionResponse:
        region, parts = await self._context.annotator.annotate(sign_request(request.annotation))
        return pb.AnnotateRegionResponse(region=region, parts=parts)

    @idempotent
    async def CreateCorrection(
        self, request: pb.CreateCorrectionRequest, context: Context
    ) -> pb.CreateCorrectionResponse:
        return pb.CreateCorrectionResponse(
            correction=await self._context.corrections.create(request.run, request.config)
        )

    async def GetCorrection(self, request: pb.GetCorrectionRequest, context: Context) -> pb.GetCorrectionResponse:
        mask = ReadMask(correction_pb2.Correction, request.read_mask)
        return pb.GetCorrectionResponse(correction=mask.of(await self._context.corrections.get(request.name)))

    async def ListCorrections(self, request: pb.ListCorrectionsRequest, context: Context) -> pb.ListCorrectionsResponse:
        mask = ReadMask(correction_pb2.Correction, request.read_mask)
        page = await self._context.corrections.page(request.run, Cursor.of(request, request.run))
        return pb.ListCorrectionsResponse(corrections=map(mask.of, page.entries), next_page_token=page.next_page_token)

    async def WatchCorrection(
        self, request: pb.WatchCorrectionRequest, context: Context
    ) -> AsyncIterator[pb.WatchCorrectionResponse]:
        async for correction in self._context.corrections.watch(request.name):
            yield pb.WatchCorrectionResponse(correction=correction)

    async def CancelCorrection(
        self, request: pb.CancelCorrectionRequest, context: Context
    ) -> pb.CancelCorrectionResponse:
        return pb.CancelCorrectionResponse(correction=await self._context.corrections.cancel(request.name))

    @idempotent
    async def ReleaseCorrection(
        self, request: pb.ReleaseCorrectionRequest, context: Context
    ) -> pb.ReleaseCorrectionResponse:
        sign_request(request)
        return pb.ReleaseCorrectionResponse(release=await self._context.publications.released(request))

    @idempotent
    async def StartTrial(self, request: pb.StartTrialRequest, context: Context) -> pb.StartTrialResponse:
        return pb.StartTrialResponse(trial=await self._context.trials.start(sign_request(request.trial)))

    async def GetTrial(self, request: pb.GetTrialRequest, context: Context) -> pb.GetTrialResponse:
        return pb.GetTrialResponse(trial=await self._context.trials.get(request.name))

    async def ListTrials(self, request: pb.ListTrialsRequest, context: Context) -> pb.ListTrialsResponse:
        page = await self._context.trials.page(request.model, Cursor.of(request, request.model))
        return pb.ListTrialsResponse(trials=page.entries, next_page_token=page.next_page_token)

    async def StopTrial(self, request: pb.StopTrialRequest, context: Context) -> pb.StopTrialResponse:
        return pb.StopTrialResponse(trial=await self._context.trials.stop(request.name))

    async def ListAuditEvents(self, request: pb.ListAuditEventsRequest, context: Context) -> pb.ListAuditEventsResponse:
        page = await asyncio.to_thread(self._context.audit_log.page, Cursor.of(request))
        return pb.ListAuditEventsResponse(events=page.entries, next_page_token=page.next_page_token)
