"""`python -m services.gateway`: the public door."""

import grpc
from defuse.v1 import (
    corrector_service_pb2_grpc,
    distiller_service_pb2_grpc,
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    generator_service_pb2_grpc,
)

from services.gateway.advice import Advice
from services.gateway.annotating import Annotator
from services.gateway.corrections import Corrections
from services.gateway.datasets import Datasets
from services.gateway.events import EventLoop
from services.gateway.files import Files
from services.gateway.passing import SERVICE, GeneratorPassage
from services.gateway.regions import Regions
from services.gateway.runs import Runs
from services.gateway.service import GatewayService, Rooms
from services.gateway.settings import GatewaySettings
from services.runtime.catalog import Catalog
from services.runtime.dependencies import Dependencies
from services.runtime.peers import Peer
from services.runtime.server import Service, serve


def build(settings: GatewaySettings) -> Service:
    """Wire the gateway."""
    needs = Dependencies.of(settings)
    files = Files(needs.store, max_bytes=settings.max_file_bytes)
    generator = Peer(settings.generator_url, generator_service_pb2_grpc.GeneratorServiceStub)
    distiller = Peer(settings.distiller_url, distiller_service_pb2_grpc.DistillerServiceStub)
    regions = Regions(needs.store)
    advice = Advice(regions, generator)
    runs = Runs(needs.queue, needs.store, needs.inference, advice)
    corrections = Corrections(needs.queue, Catalog(needs.store), runs, regions)
    rooms = Rooms(
        store=needs.store,
        files=files,
        datasets=Datasets(needs.store, files, max_bytes=settings.max_file_bytes),
        runs=runs,
        regions=regions,
        annotator=Annotator(regions, distiller),
        advice=advice,
        corrections=corrections,
        corrector=Peer(settings.corrector_url, corrector_service_pb2_grpc.CorrectorServiceStub),
        generator=generator,
        distiller=distiller,
    )

    passage = GeneratorPassage(settings.generator_url)

    def register(server: grpc.aio.Server) -> None:
        gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(GatewayService(rooms), server)
        server.add_generic_rpc_handlers((passage,))

    async def close() -> None:
        await rooms.corrector.close()
        await rooms.distiller.close()
        await rooms.generator.close()
        await passage.close()
        await needs.queue.close()

    return Service(
        names=[gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name, SERVICE.full_name],
        register=register,
        checks=needs.checks,
        loops=[EventLoop(needs.queue, needs.store, runs, corrections).run],
        close=close,
    )


if __name__ == "__main__":
    serve("gateway", GatewaySettings.load(), build)
