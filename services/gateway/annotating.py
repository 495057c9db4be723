"""Verdicts on regions, and what follows from them: a region that shows several classes is split."""

import asyncio
from collections.abc import Sequence

from defuse import names
from defuse.errors import DeadlineExceeded, Unavailable
from defuse.v1 import annotation_pb2, distiller_service_pb2, distiller_service_pb2_grpc, region_pb2

from services.gateway.regions import Regions
from services.runtime.channels import Peer


class Annotator:
    """Takes verdicts on regions."""

    def __init__(
        self, regions: Regions, distiller: "Peer[distiller_service_pb2_grpc.DistillerServiceAsyncStub]"
    ) -> None:
        self._regions = regions
        self._distiller = distiller

    async def annotate(
        self, annotation: annotation_pb2.Annotation
    ) -> tuple[region_pb2.Region, Sequence[region_pb2.Region]]:
        """Store a verdict; return the region with it and, where it is mixed, its parts, largest score first.

        The verdict is stored whatever becomes of the split. Raises NotReady where the region has no parts, Unavailable
        or DeadlineExceeded where the distiller did not answer; the same verdict once more then completes it.
        """
        region = await asyncio.to_thread(self._regions.annotate, annotation)
        if annotation.verdict != annotation_pb2.Annotation.VERDICT_MIXED:
            return region, []
        await self._split(region.name)
        return region, await asyncio.to_thread(self._regions.parts, region.name)

    async def _split(self, name: str) -> None:
        wanted = distiller_service_pb2.SplitRegionRequest(region=name)
        try:
            await self._distiller.call(lambda stub, **how: stub.SplitRegion(wanted, **how))
        except (Unavailable, DeadlineExceeded) as error:
            raise type(error)(
                f"region {names.last(name)!r} is annotated as mixed, but not split yet ({error.message}); annotate it "
                "once more when the distiller answers",
                reason=error.reason,
            ) from error
