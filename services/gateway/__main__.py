"""`python -m services.gateway`: the server of the public API."""

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
from services.gateway.access.interceptors import AccessInterceptor, RateLimitInterceptor, RateLimits
from services.gateway.audit.audit_log import AuditInterceptor, AuditLog
from services.gateway.corrections.corrections import Corrections
from services.gateway.datasets.datasets import Datasets
from services.gateway.files.files import Files
from services.gateway.guards.guards import Guards
from services.gateway.inference import proxy as inference_proxy
from services.gateway.inference.proxy import InferenceProxy
from services.gateway.inference.routing import RoutingTable
from services.gateway.inference.shadow import TrialCounters
from services.gateway.latent import proxy as latent_proxy
from services.gateway.latent.proxy import GeneratorProxy
from services.gateway.models.models import Models
from services.gateway.monitoring.service import Monitoring
from services.gateway.operations import service as operations_service
from services.gateway.operations.service import Operations, OperationsService
from services.gateway.records.events import EventConsumer
from services.gateway.records.idempotency import IdempotentRequests
from services.gateway.regions.regions import Annotator, Regions
from services.gateway.releases.releases import CandidateRetirement, ReleaseOperations
from services.gateway.runs.config import ThresholdAdvisor
from services.gateway.runs.runs import Runs
from services.gateway.service import GatewayContext, GatewayService
from services.gateway.settings import GatewaySettings
from services.gateway.tokens import Tokens
from services.gateway.trials.trials import Trials
from services.runtime.server import Service, serve
from services.runtime.tls import ServiceClient
from services.storage.catalog import Catalog

# The gate may have to run first.
GATE_DEADLINE_S = 900.0


def build(settings: GatewaySettings) -> Service:
    """Build the gateway's services, proxies and background tasks from its settings."""
    needs = Dependencies.of(settings)
    context = _context(settings, needs)
    operations = Operations(needs.queue, context.runs, context.corrections, context.publications)
    tally, routes = TrialCounters(context.trials), RoutingTable(context.trials)
    limits = RateLimits(calls_per_s=settings.max_calls_per_s, concurrent_calls=settings.max_concurrent_calls)
    monitoring = Monitoring(settings, needs.queue, needs.store, context.runs, limits)
    proxies = (
        GeneratorProxy(settings.generator_url, settings.tls),
        InferenceProxy(settings.triton_url, settings.tls, routes, tally, shared_memory=settings.shared_memory),
    )

    def register(server: grpc.aio.Server) -> None:
        gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(GatewayService(context), server)
        operations_pb2_grpc.add_OperationsServicer_to_server(OperationsService(operations), server)
        monitor_service_pb2_grpc.add_MonitorServiceServicer_to_server(monitoring.service, server)
        server.add_generic_rpc_handlers(proxies)

    async def close() -> None:
        for connected in (context, *proxies):
            await connected.close()
        await needs.queue.close()

    owners = {
        "runs": context.runs.apply,
        "corrections": context.corrections.apply,
        "publications": context.publications.apply,
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
            *EventConsumer(needs.queue, needs.store, owners).loops,
            *monitoring.loops,
            routes.run,
            tally.run,
        ],
        close=close,
        interceptors=_auth_interceptors(settings, context.audit_log, limits),
    )


def _context(settings: GatewaySettings, needs: Dependencies) -> GatewayContext:
    """Build the objects that the servicers delegate to."""
    files = Files(needs.store, max_bytes=settings.max_file_bytes)
    generator = ServiceClient(settings.generator_url, generator_service_pb2_grpc.GeneratorServiceStub, settings.tls)
    distiller = ServiceClient(settings.distiller_url, distiller_service_pb2_grpc.DistillerServiceStub, settings.tls)
    corrector = ServiceClient(settings.corrector_url, corrector_service_pb2_grpc.CorrectorServiceStub, settings.tls)
    regions = Regions(needs.store)
    threshold_advisor = ThresholdAdvisor(regions, generator)
    runs = Runs(needs.queue, needs.store, needs.inference, threshold_advisor)
    corrections = Corrections(needs.queue, Catalog(needs.store), runs, regions)
    trials = Trials(needs.queue, Catalog(needs.store), corrections, functools.partial(_serve_candidate, corrector))
    candidates = CandidateRetirement(trials, corrector)
    return GatewayContext(
        store=needs.store,
        files=files,
        datasets=Datasets(needs.store, files, max_bytes=settings.max_file_bytes),
        requests=IdempotentRequests(needs.queue),
        runs=runs,
        regions=regions,
        annotator=Annotator(regions, distiller),
        threshold_advisor=threshold_advisor,
        corrections=corrections,
        publications=ReleaseOperations(needs.queue, corrections, candidates.retire),
        trials=trials,
        audit_log=AuditLog(needs.store),
        models=Models(needs.store, corrector, candidates),
        guards=Guards(Catalog(needs.store), corrector),
        corrector=corrector,
        generator=generator,
        distiller=distiller,
    )


def _auth_interceptors(
    settings: GatewaySettings, audit_log: AuditLog, limits: RateLimits
) -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors: audit, then rate limits, then authentication.

    Rate limits also count rejected callers, and the audit log records the outcome of both.
    """
    access = [AccessInterceptor(Tokens(settings.tokens_file))] if settings.tokens_file else []
    return [AuditInterceptor(audit_log), RateLimitInterceptor(limits), *access]


async def _serve_candidate(
    corrector: "ServiceClient[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]", trial: trial_pb2.Trial
) -> tuple[str, int]:
    """Make the corrector serve the candidate of a trial."""
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
