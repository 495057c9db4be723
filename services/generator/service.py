"""GeneratorService: translates and delegates."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from defuse import names, tensors
from defuse.errors import InvalidInput
from defuse.v1 import failure_pb2, run_pb2
from defuse.v1 import generator_service_pb2 as pb
from defuse.v1 import generator_service_pb2_grpc as pb_grpc

from services.generator import vae
from services.generator.workbench import VAE, Workbench
from services.runtime import catalog
from services.runtime.inference import as_stored

_POLL_S = 0.5
Context = grpc.aio.ServicerContext[Any, Any]


class GeneratorService(pb_grpc.GeneratorServiceServicer):
    """Failures as they are found, and the VAE as a service."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    async def Identify(self, request: pb.IdentifyRequest, context: Context) -> AsyncIterator[pb.IdentifyResponse]:
        run = await asyncio.to_thread(self._bench.catalog.run, request.run)
        while not await asyncio.to_thread(self._bench.store.exists, catalog.sources(run.name)):
            await asyncio.sleep(_POLL_S)
        prepared = await asyncio.to_thread(self._bench.prepared, run)
        for shard in range(-(-len(prepared.index) // run.config.search.shard_size)):
            while not await asyncio.to_thread(self._bench.store.exists, catalog.shard_counts(run.name, shard)):
                await asyncio.sleep(_POLL_S)
            yield await asyncio.to_thread(self._shard, run, shard)

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:
        images = tensors.images_from_proto(request.images)
        mu, sigma = await asyncio.to_thread(self._encode, request.run, images)
        return pb.EncodeResponse(mu=tensors.floats_to_proto(mu), sigma=tensors.floats_to_proto(sigma))

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        latents = tensors.floats_from_proto(request.latents)
        images = await asyncio.to_thread(self._decode, request.run, latents)
        return pb.DecodeResponse(images=tensors.images_to_proto(images))

    def _shard(self, run: run_pb2.Run, shard: int) -> pb.IdentifyResponse:
        arrays = self._bench.store.read_arrays(catalog.failures(run.name, shard))
        rows = [{name: array[i] for name, array in arrays.items()} for i in range(len(arrays["source"]))]
        return pb.IdentifyResponse(shard=shard, failures=[_failure(run, row) for row in rows])

    def _encode(self, run_name: str, images: Any) -> tuple[Any, Any]:
        network = self._network(run_name)
        channels, height, width = network.config.image_shape
        if images.shape[1:] != (height, width, channels):
            raise InvalidInput(
                f"the VAE of {names.last(run_name)!r} takes images of {height}x{width}x{channels}, not "
                f"{'x'.join(str(size) for size in images.shape[1:])}"
            )
        return vae.encode_images(network, images, device=self._bench.device, batch_size=len(images))

    def _decode(self, run_name: str, latents: Any) -> Any:
        network = self._network(run_name)
        if latents.ndim != 2 or latents.shape[1] != network.config.latent_dim or not np.isfinite(latents).all():
            raise InvalidInput(
                f"the VAE of {names.last(run_name)!r} takes finite latents of shape (n, {network.config.latent_dim}), "
                f"not {latents.shape}"
            )
        return as_stored(self._bench.decode(network, latents))

    def _network(self, run_name: str) -> vae.Vae:
        run = self._bench.catalog.run(run_name)
        return self._bench.vae(catalog.vae(run.config, VAE))


def _failure(run: run_pb2.Run, row: dict[str, Any]) -> failure_pb2.Failure:
    return failure_pb2.Failure(
        run=run.name,
        source=int(row["source"]),
        round=int(row["round"]),
        draw=int(row["draw"]),
        true_label=int(row["true_label"]),
        predicted_label=int(row["predicted_label"]),
        margin=float(row["margin"]),
        radius_sd=float(row["radius_sd"]),
        label_probability=float(row["label_probability"]),
        latent=row["latent"].tolist(),
        model_version=run.config.model_version,
        held_out=bool(row["held_out"]),
    )
