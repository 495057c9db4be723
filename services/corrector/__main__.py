"""`python -m services.corrector`: the service that corrects and releases models.

It turns annotated regions into weights, an ONNX file and a version in Triton. Under torchrun all processes share each
training, with a GPU each: `torchrun --nproc-per-node 4 -m services.corrector`. The first process is the service, and
the others follow it.
"""

import functools
import signal
from pathlib import Path
from typing import Any

from defuse.v1 import corrector_service_pb2, corrector_service_pb2_grpc, work_pb2
from pydantic import Field

from services.corrector.candidate_choice import CandidateChooser, choose_candidate
from services.corrector.distributed import SINGLE_PROCESS, ProcessGroup, TorchrunGroup, torchrun_group
from services.corrector.external_triton import AnyReleases, ExternalTritonReleases
from services.corrector.gate.decision import Gate
from services.corrector.guard.builder import GuardIssuer
from services.corrector.own_triton import Releases
from services.corrector.publishing import Publisher, publish
from services.corrector.service import CorrectorService
from services.corrector.training import Trainer, follow_announced, train
from services.dependencies import Dependencies, TransportSettings, device_of, limit_threads
from services.runtime import telemetry
from services.runtime.queue import CHOOSE, PUBLISH, TRAIN
from services.runtime.server import Service, serve
from services.runtime.worker import Stage, Worker


class CorrectorSettings(TransportSettings):
    """Settings of the corrector, in addition to those of every service."""

    triton_repository: Path = Field(
        Path("/var/lib/defuse/models"), description="Triton's model repository; the corrector is its one writer."
    )
    handover: Path | None = Field(
        None,
        description="Directory for handed-over releases of an external Triton; unset for our own Triton.",
    )
    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="`cuda` if there is one, else `cpu`."
    )
    threads: int = Field(0, ge=0, description="Threads of torch on the CPU; 0 leaves the choice to torch.")
    torch_factories: str = Field(
        "",
        description="Modules, or `module:function`s, separated by commas, that a correction may name as torch factory: "
        "they run as code in the corrector.",
    )

    @property
    def factories(self) -> list[str]:
        """Return the entries of `torch_factories`."""
        return [entry.strip() for entry in self.torch_factories.split(",") if entry.strip()]


def main() -> None:
    """Run the service; under torchrun, the other processes only train."""
    settings = CorrectorSettings.load()
    limit_threads(settings.threads)
    process_group, device = torchrun_group(device_of(settings.device))
    needs = Dependencies.of(settings)
    processes: ProcessGroup = process_group or SINGLE_PROCESS
    trainer = Trainer(store=needs.store, device=device, factories=settings.factories, processes=processes)
    if process_group and process_group.rank:
        _follow(settings, trainer, process_group)
        return
    serve("corrector", settings, functools.partial(_build, trainer=trainer, needs=needs))
    processes.announce(None)
    if process_group:
        process_group.close()


def _build(settings: CorrectorSettings, *, trainer: Trainer, needs: Dependencies) -> Service:
    """Build the corrector's service and its stages."""
    loops: list[Any] = []
    releases: AnyReleases
    if settings.handover:
        releases = ExternalTritonReleases(needs.store, needs.inference, settings.handover)
        loops.append(releases.watch_versions)
    else:
        releases = Releases(needs.store, needs.inference, settings.triton_repository)
    gate, guards = Gate(needs.store, releases), GuardIssuer(needs.store, releases)
    chooser = CandidateChooser(store=needs.store, releases=releases, gate=gate)
    stages: dict[str, Stage[Any]] = {
        CHOOSE: Stage(
            kind=work_pb2.ChooseWork,
            subject=lambda work: work.correction.name,
            handle=functools.partial(choose_candidate, chooser),
        ),
        TRAIN: Stage(
            kind=work_pb2.TrainWork,
            subject=lambda work: work.correction.name,
            handle=functools.partial(train, trainer),
            details=lambda work: {"training": work.training},
        ),
    }
    publisher = Publisher(store=needs.store, releases=releases, gate=gate, guards=guards)
    publishing = Stage(
        kind=work_pb2.PublishWork,
        subject=lambda work: work.publication.name,
        handle=functools.partial(publish, publisher),
    )
    return Service(
        names=[corrector_service_pb2.DESCRIPTOR.services_by_name["CorrectorService"].full_name],
        register=lambda server: corrector_service_pb2_grpc.add_CorrectorServiceServicer_to_server(
            CorrectorService(needs.store, releases, gate, guards), server
        ),
        checks=needs.checks,
        # Releases do not wait for trainings.
        loops=[*Worker(needs.queue, stages).loops, *Worker(needs.queue, {PUBLISH: publishing}).loops, *loops],
        close=needs.queue.close,
    )


def _follow(settings: CorrectorSettings, trainer: Trainer, process_group: TorchrunGroup) -> None:
    telemetry.configure_logging("corrector", level=settings.log_level, log_format=settings.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the first process ends the others when it drains
    while (work := process_group.next_work()) is not None:
        follow_announced(trainer, work)
    process_group.close()


if __name__ == "__main__":
    main()
