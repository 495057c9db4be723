"""`python -m services.corrector`: annotated regions -> weights -> ONNX -> Triton version."""

import functools

import torch
from defuse.v1 import corrector_service_pb2, corrector_service_pb2_grpc, work_pb2

from services.corrector import worker
from services.corrector.release import Releases
from services.corrector.repository import TritonRepository
from services.corrector.service import CorrectorService
from services.corrector.settings import CorrectorSettings
from services.runtime.dependencies import Dependencies
from services.runtime.devices import device_of, limit_threads
from services.runtime.queue import CORRECT
from services.runtime.server import Service, serve
from services.runtime.worker import Stage, Worker


def build(settings: CorrectorSettings) -> Service:
    """Wire the corrector."""
    limit_threads(settings.threads)
    needs = Dependencies.of(settings)
    root = settings.triton_repository
    releases = Releases(needs.store, TritonRepository(root, needs.inference), root)
    device: torch.device = device_of(settings.device)
    tools = worker.Tools(store=needs.store, inference=needs.inference, releases=releases, device=device)
    stages = {
        CORRECT: Stage(
            kind=work_pb2.CorrectWork,
            subject=lambda work: work.correction.name,
            handle=functools.partial(worker.correct, tools),
        )
    }
    return Service(
        names=[corrector_service_pb2.DESCRIPTOR.services_by_name["CorrectorService"].full_name],
        register=lambda server: corrector_service_pb2_grpc.add_CorrectorServiceServicer_to_server(
            CorrectorService(needs.store, releases), server
        ),
        checks=needs.checks,
        loops=[Worker(needs.queue, stages).run],
        close=needs.queue.close,
    )


if __name__ == "__main__":
    serve("corrector", CorrectorSettings.load(), build)
