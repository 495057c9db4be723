"""`python -m services.distiller`: the service that groups failures into regions."""

import functools

from defuse.v1 import distiller_service_pb2, distiller_service_pb2_grpc, work_pb2

from services.dependencies import Dependencies, TransportSettings
from services.distiller import worker
from services.distiller.assessment import DistillerDependencies
from services.distiller.observation_scoring import ObservationScorer
from services.distiller.service import DistillerService
from services.runtime.queue import DISTILL, WATCH
from services.runtime.server import Service, serve
from services.runtime.worker import Stage, Worker


def build(settings: TransportSettings) -> Service:
    """Build the distiller's service and its stages from its settings."""
    needs = Dependencies.of(settings)
    dependencies = DistillerDependencies(store=needs.store, inference=needs.inference)
    stages = {
        DISTILL: Stage(
            kind=work_pb2.DistillWork,
            subject=lambda work: work.run.name,
            handle=functools.partial(worker.distill, dependencies),
        )
    }
    # Traffic is scored without waiting for the regions of a run.
    watching = Stage(
        kind=work_pb2.WatchWork, subject=lambda work: work.model, handle=ObservationScorer(dependencies).watch
    )
    return Service(
        names=[distiller_service_pb2.DESCRIPTOR.services_by_name["DistillerService"].full_name],
        register=lambda server: distiller_service_pb2_grpc.add_DistillerServiceServicer_to_server(
            DistillerService(dependencies), server
        ),
        checks=needs.checks,
        loops=[*Worker(needs.queue, stages).loops, *Worker(needs.queue, {WATCH: watching}).loops],
        close=needs.queue.close,
    )


if __name__ == "__main__":
    serve("distiller", TransportSettings.load(), build)
