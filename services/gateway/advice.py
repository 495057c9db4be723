"""Validity thresholds that the annotations of a finished run advise for the next one."""

import asyncio

from defuse import names
from defuse.errors import NotReady
from defuse.v1 import generator_service_pb2, generator_service_pb2_grpc, run_pb2

from services.gateway.regions import Regions
from services.gateway.run_config import complete
from services.runtime.channels import Peer


class Advice:
    """Learns from verdicts, through the generator, who knows what a threshold is of."""

    def __init__(
        self, regions: Regions, generator: "Peer[generator_service_pb2_grpc.GeneratorServiceAsyncStub]"
    ) -> None:
        self._regions = regions
        self._generator = generator

    async def of(self, run: run_pb2.Run) -> run_pb2.ValidityAdvice:
        """Return what the latest verdicts on the regions of a run advise; raise NotReady where they say nothing."""
        judged = await asyncio.to_thread(self._regions.judged, run)
        for named, word in ((judged.invalid, "invalid"), (judged.valid, "labelled as their sources are")):
            if not named:
                raise NotReady(
                    f"no region of run {names.last(run.name)!r} is {word}; thresholds are learned from what sets "
                    "invalid regions apart from labelled ones: annotate at least one of each",
                    reason="NOTHING_TO_LEARN",
                )
        wanted = generator_service_pb2.LearnValidityRequest(
            run=run.name, valid_regions=judged.valid, invalid_regions=judged.invalid
        )
        answer = await self._generator.call(lambda stub, **how: stub.LearnValidity(wanted, **how))
        advice: run_pb2.ValidityAdvice = answer.advice
        return advice


def advised(config: run_pb2.RunConfig, advice: run_pb2.ValidityAdvice, whose: run_pb2.Run) -> run_pb2.RunConfig:
    """Return a configuration whose validity thresholds, where they were left out, are those of the advice.

    The radius is left to its default where the steps of the other run follow another law: they have other sizes there.
    """
    whole = run_pb2.RunConfig(validity=advice.validity)
    if complete(config).search.noise != whose.config.search.noise:
        whole.validity.ClearField("max_radius_sd")
    whole.MergeFrom(config)
    return whole
