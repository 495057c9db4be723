"""DistillerService: converts calls and delegates them."""

import asyncio
from typing import Any

import grpc
import numpy as np
from defuse import names, tensors
from defuse.errors import InvalidInput
from defuse.v1 import distiller_service_pb2 as pb
from defuse.v1 import distiller_service_pb2_grpc as pb_grpc

from services.arrays import Array, as_stored
from services.distiller.assessment import DistillerDependencies
from services.distiller.region_diff import diff_regions
from services.distiller.worker import split_region
from services.latent_space.run_images import RegionShape, RunImages
from services.storage import keys
from services.storage.catalog import Catalog

MAX_SAMPLES = 256


class DistillerService(pb_grpc.DistillerServiceServicer):
    """The gRPC service for fresh images, splits and comparisons of regions."""

    def __init__(self, dependencies: DistillerDependencies) -> None:
        self._dependencies = dependencies

    async def SampleRegion(
        self, request: pb.SampleRegionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SampleRegionResponse:
        if not 1 <= request.count <= MAX_SAMPLES:
            raise InvalidInput(f"count is {request.count}; ask for 1 to {MAX_SAMPLES} images")
        images = await asyncio.to_thread(self._sample, request.region, request.count, request.seed)
        return pb.SampleRegionResponse(images=tensors.images_to_proto(images))

    async def SplitRegion(
        self, request: pb.SplitRegionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SplitRegionResponse:
        return pb.SplitRegionResponse(parts=await asyncio.to_thread(split_region, self._dependencies, request.region))

    async def CompareRegions(
        self, request: pb.CompareRegionsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CompareRegionsResponse:
        diff = await asyncio.to_thread(diff_regions, self._dependencies.store, request.before, request.after)
        return pb.CompareRegionsResponse(diff=diff)

    def _sample(self, region: str, count: int, seed: int) -> Array:
        reader = Catalog(self._dependencies.store)
        reader.region(region)
        run = reader.run(names.parent(region))
        arrays = self._dependencies.store.read_arrays(keys.region_arrays(region))
        images, shape = RunImages(self._dependencies.store, run), RegionShape.of(arrays)
        return as_stored(images.render(images.unchecked(shape, count, np.random.default_rng(seed))))
