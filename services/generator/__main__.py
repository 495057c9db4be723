"""`python -m services.generator`: the service that searches for failures."""

import functools
from typing import Any

from defuse.v1 import generator_service_pb2, generator_service_pb2_grpc, work_pb2
from pydantic import Field

from services.dependencies import Dependencies, TransportSettings, device_of, limit_threads
from services.generator import preparation, worker
from services.generator.run_context import RunContext
from services.generator.service import GeneratorService
from services.runtime.queue import IDENTIFY, PLAN, PREPARE
from services.runtime.server import Service, serve
from services.runtime.worker import Stage, Worker


class GeneratorSettings(TransportSettings):
    """Settings of the generator, in addition to those of every service."""

    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="`cuda` if there is one, else `cpu`."
    )
    threads: int = Field(0, ge=0, description="Threads of torch on the CPU; 0 leaves the choice to torch.")
    triton_requests_in_flight: int = Field(4, ge=1, description="Requests sent to Triton before an answer is awaited.")


def build(settings: GeneratorSettings) -> Service:
    """Build the generator's service and its stages from its settings."""
    limit_threads(settings.threads)
    needs = Dependencies.of(settings, in_flight=settings.triton_requests_in_flight)
    context = RunContext(needs.store, needs.inference, device_of(settings.device))
    stages: dict[str, Stage[Any]] = {
        IDENTIFY: Stage(
            kind=work_pb2.IdentifyWork,
            subject=lambda work: work.run.name,
            handle=functools.partial(worker.identify, context),
            details=lambda work: {"shard": work.shard, "round": work.round},
        ),
        PLAN: Stage(
            kind=work_pb2.PlanWork,
            subject=lambda work: work.run.name,
            handle=functools.partial(worker.plan, context),
            details=lambda work: {"round": work.round},
        ),
        PREPARE: Stage(
            kind=work_pb2.PrepareWork,
            subject=lambda work: work.run.name,
            handle=functools.partial(preparation.prepare, context),
        ),
    }
    return Service(
        names=[generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"].full_name],
        register=lambda server: generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(
            GeneratorService(context, needs.queue), server
        ),
        checks=needs.checks,
        loops=Worker(needs.queue, stages).loops,
        close=needs.queue.close,
    )


if __name__ == "__main__":
    serve("generator", GeneratorSettings.load(), build)
