"""`python -m services.gateway`: the public door."""

import functools

import grpc
from defuse.v1 import (
    corrector_service_pb2,
    corrector_service_pb2_grpc,
    distiller_service_pb2_grpc,
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    generator_service_pb2_grpc,
    monitor_service_pb2,
    monitor_service_pb2_grpc,
    trial_pb2,
)
from google.longrunning import operations_pb2_grpc

from services.dependencies import Dependencies
from services.gateway.access.interceptors import AccessInterceptor, Limits, LimitsInterceptor
from services.gateway.access.tokens import Tokens
from services.gateway.audit.journal import AuditInterceptor, Journal
from services.gateway.corrections.corrections import Corrections
from services.gateway.datasets.datasets import Datasets
from services.gateway.files.files import Files
from services.gateway.inference import proxy as inference_proxy
from services.gateway.inference.proxy import InferencePassage
from services.gateway.inference.routing import Routes
from services.gateway.inference.shadow import Tally
from services.gateway.latent import proxy as latent_proxy
from services.gateway.latent.proxy import GeneratorPassage
from services.gateway.monitoring.service import Monitoring
from services.gateway.operations import service as operations_service
from services.gateway.operations.operations import Operations
from services.gateway.operations.service import OperationsService
from services.gateway.records.events import EventLoop
from services.gateway.records.idempotency import Requests
from services.gateway.regions.regions import Annotator, Regions
from services.gateway.releases.releases import Candidates, Publications
from services.gateway.runs.config import Advice
from services.gateway.runs.runs import Runs
from services.gateway.service import GatewayService, Rooms
from services.gateway.settings import GatewaySettings
from services.gateway.trials.trials import Trials
from services.runtime.channels import Peer
from services.runtime.server import Service, serve
from services.storage.catalog import Catalog

# The gate may have to be asked anew.
GATE_DEADLINE_S = 900.0


def build(settings: GatewaySettings) -> Service:
    """Wire the gateway."""
    needs = Dependencies.of(settings)
    rooms = _rooms(settings, needs)
    operations = Operations(needs.queue, rooms.runs, rooms.corrections, rooms.publications)
    tally, routes = Tally(rooms.trials), Routes(rooms.trials)
    limits = Limits(calls_per_s=settings.max_calls_per_s, concurrent_calls=settings.max_concurrent_calls)
    monitoring = Monitoring(settings, needs.queue, needs.store, rooms.runs, limits)
    passages = (
        GeneratorPassage(settings.generator_url, settings.tls),
        InferencePassage(settings.triton_url, settings.tls, routes, tally, shared_memory=settings.shared_memory),
    )

    def register(server: grpc.aio.Server) -> None:
        gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(GatewayService(rooms), server)
        operations_pb2_grpc.add_OperationsServicer_to_server(OperationsService(operations), server)
        monitor_service_pb2_grpc.add_MonitorServiceServicer_to_server(monitoring.service, server)
        server.add_generic_rpc_handlers(passages)

    async def close() -> None:
        for connected in (rooms, *passages):
            await connected.close()
        await needs.queue.close()

    folds = {
        "runs": rooms.runs.apply,
        "corrections": rooms.corrections.apply,
        "publications": rooms.publications.apply,
        "models": monitoring.monitors.apply,
    }
    return Service(
        names=[
            gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name,
            monitor_service_pb2.DESCRIPTOR.services_by_name["MonitorService"].full_name,
            latent_proxy.SERVICE.full_name,
            inference_proxy.SERVICE.full_name,
            operations_service.SERVICE.full_name,
        ],
        register=register,
        checks=needs.checks,
        loops=[
            *EventLoop(needs.queue, needs.store, folds).loops,
            *monitoring.loops,
            routes.run,
            tally.run,
        ],
        close=close,
        interceptors=_doorkeepers(settings, rooms.journal, limits),
    )


def _rooms(settings: GatewaySettings, needs: Dependencies) -> Rooms:
    """Return what the methods of the public API work with."""
    files = Files(needs.store, max_bytes=settings.max_file_bytes)
    generator = Peer(settings.generator_url, generator_service_pb2_grpc.GeneratorServiceStub, settings.tls)
    distiller = Peer(settings.distiller_url, distiller_service_pb2_grpc.DistillerServiceStub, settings.tls)
    corrector = Peer(settings.corrector_url, corrector_service_pb2_grpc.CorrectorServiceStub, settings.tls)
    regions = Regions(needs.store)
    advice = Advice(regions, generator)
    runs = Runs(needs.queue, needs.store, needs.inference, advice)
    corrections = Corrections(needs.queue, Catalog(needs.store), runs, regions)
    trials = Trials(needs.queue, Catalog(needs.store), corrections, functools.partial(_serve_candidate, corrector))
    candidates = Candidates(trials, corrector)
    return Rooms(
        store=needs.store,
        files=files,
        datasets=Datasets(needs.store, files, max_bytes=settings.max_file_bytes),
        requests=Requests(needs.queue),
        runs=runs,
        regions=regions,
        annotator=Annotator(regions, distiller),
        advice=advice,
        corrections=corrections,
        publications=Publications(needs.queue, corrections, candidates.retire),
        trials=trials,
        journal=Journal(needs.store),
        candidates=candidates,
        corrector=corrector,
        generator=generator,
        distiller=distiller,
    )


def _doorkeepers(settings: GatewaySettings, journal: Journal, limits: Limits) -> list[grpc.aio.ServerInterceptor]:
    """Return what stands before the methods: how often, also for who is not let in; what tells of it before both."""
    access = [AccessInterceptor(Tokens(settings.tokens_file))] if settings.tokens_file else []
    return [AuditInterceptor(journal), LimitsInterceptor(limits), *access]


async def _serve_candidate(
    corrector: "Peer[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]", trial: trial_pb2.Trial
) -> tuple[str, int]:
    """Have the corrector serve the candidate of a trial."""
    wanted = corrector_service_pb2.ServeCandidateRequest(
        correction=trial.correction,
        answers_callers=trial.mode == trial_pb2.Trial.MODE_CANARY,
        approver=trial.approver,
        reason=trial.reason,
    )
    answer = await corrector.call(lambda stub, **how: stub.ServeCandidate(wanted, **how), deadline_s=GATE_DEADLINE_S)
    return answer.candidate, answer.version


if __name__ == "__main__":
    serve("gateway", GatewaySettings.load(), build)
