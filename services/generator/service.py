"""GeneratorService: converts calls and delegates them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from defuse import names, tensors
from defuse.errors import InvalidInput, NotReady
from defuse.v1 import generator_service_pb2 as pb
from defuse.v1 import generator_service_pb2_grpc as pb_grpc
from defuse.v1 import run_pb2, work_pb2

from services.arrays import Array, as_floats, as_stored
from services.generator import preparation
from services.generator.codec import Codec, as_array
from services.generator.failure_stream import StreamPosition, stream_failures
from services.generator.run_context import RunContext, fit_run_thresholds, real_images
from services.latent_space.rendering import Renderer, SourceImages
from services.runtime.queue import EVENTS, Queue
from services.runtime.worker import CANCEL_MARK_S, cancel_key
from services.storage import keys
from services.storage.catalog import is_open, is_residual

MAX_FRAMES = 256
MAX_IMAGE_BYTES = 1 << 20
Context = grpc.aio.ServicerContext[Any, Any]


class GeneratorService(pb_grpc.GeneratorServiceServicer):
    """The gRPC service for failures, fitted thresholds, and the VAE."""

    def __init__(self, context: RunContext, queue: Queue) -> None:
        self._context = context
        self._queue = queue

    async def Identify(self, request: pb.IdentifyRequest, context: Context) -> AsyncIterator[pb.IdentifyResponse]:
        begin = StreamPosition.of(request.resume_token)
        run = await asyncio.to_thread(self._context.catalog.run, request.run)
        try:
            async for response in stream_failures(self._context, run, begin):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            if request.cancel_run:
                await asyncio.shield(self._cancel(run.name))
            raise

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:
        images = tensors.images_from_proto(request.images)
        mu, sigma = await asyncio.to_thread(self._encode, request.run, images)
        return pb.EncodeResponse(mu=tensors.floats_to_proto(mu), sigma=tensors.floats_to_proto(sigma))

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        latents = tensors.floats_from_proto(request.latents)
        sources = np.array(request.sources, np.int64)
        images = await asyncio.to_thread(self._decode, request.run, latents, sources)
        return pb.DecodeResponse(images=tensors.images_to_proto(images))

    async def Interpolate(self, request: pb.InterpolateRequest, context: Context) -> pb.InterpolateResponse:
        ends = tensors.images_from_proto(request.ends)
        images, labels = await asyncio.to_thread(self._interpolate, request.run, ends, request.frames)
        return pb.InterpolateResponse(images=tensors.images_to_proto(images), predicted_labels=labels.tolist())

    async def Estimate(self, request: pb.EstimateRequest, context: Context) -> pb.EstimateResponse:
        return pb.EstimateResponse(
            estimate=await asyncio.to_thread(preparation.estimate_cost, self._context, request.config)
        )

    async def LearnValidity(self, request: pb.LearnValidityRequest, context: Context) -> pb.LearnValidityResponse:
        advice = await asyncio.to_thread(
            fit_run_thresholds,
            self._context.catalog,
            request.run,
            invalid=request.invalid_regions,
            valid=request.valid_regions,
        )
        return pb.LearnValidityResponse(advice=advice)

    async def _cancel(self, run_name: str) -> None:
        """Cancel a run, whose workers then stop at their next batch.

        A run that has ended stays as it is.
        """
        ended = [keys.event(run_name, kind) for kind in ("distilled", "failed", "cancelled")]
        if any([await asyncio.to_thread(self._context.store.exists, key) for key in ended]):
            return
        await self._queue.redis.set(cancel_key(run_name), "1", ex=CANCEL_MARK_S)
        await self._queue.send(EVENTS, work_pb2.Event(subject=run_name, cancelled=work_pb2.Cancelled()))

    def _encode(self, run_name: str, images: Array) -> tuple[Array, Array]:
        _, pair = self._opened(run_name)
        _check_images(run_name, pair, images)
        _check_size(len(images), pair)
        return pair.encode_stored(images)

    def _decode(self, run_name: str, latents: Array, sources: Array) -> Array:
        run, pair = self._opened(run_name)
        if latents.ndim != 2 or latents.shape[1] != pair.latent_dim or not np.isfinite(latents).all():
            raise InvalidInput(
                f"the VAE of {names.last(run_name)!r} takes finite latents of shape (n, {pair.latent_dim}), "
                f"not {latents.shape}"
            )
        _check_size(len(latents), pair)
        return as_stored(as_array(self._renderer(run, pair, latents, sources)(latents, sources)))

    def _renderer(self, run: run_pb2.Run, pair: Codec, latents: Array, sources: Array) -> Renderer:
        """Return what renders latents around sources of a run."""
        if not is_residual(run.config):
            return Renderer(decode=pair.decode)
        searched = self._context.images(run, keys.SEARCHED_SPLIT)
        if len(sources) != len(latents) or (sources < 0).any() or (sources >= len(searched.labels)).any():
            raise InvalidInput(
                f"run {names.last(run.name)!r} changes real images: give the source of each of the {len(latents)} "
                f"latents, as its failures name it, from 0 to {len(searched.labels) - 1}",
                reason="NO_SOURCE",
                field="sources",
            )
        rows = np.unique(sources)
        mu, _ = pair.encode_stored(real_images(searched, rows))
        return Renderer(decode=pair.decode, sources=SourceImages(row=rows, mu=mu, images=searched.images))

    def _interpolate(self, run_name: str, ends: Array, frames: int) -> tuple[Array, Array]:
        run, pair = self._opened(run_name)
        _check_images(run_name, pair, ends)
        if len(ends) != 2 or not 2 <= frames <= MAX_FRAMES:
            raise InvalidInput(
                f"give two images and 2 to {MAX_FRAMES} frames for a walk between them, not {len(ends)} images and "
                f"{frames} frames"
            )
        _check_size(frames, pair)
        mu, _ = pair.encode(as_floats(ends))
        share = np.linspace(0, 1, frames, dtype=np.float32)[:, None]
        z = (1 - share) * mu[0] + share * mu[1]
        if is_residual(run.config):
            around = Renderer(decode=pair.decode, sources=SourceImages(row=np.arange(2), mu=mu, images=ends))
            first, last = (as_array(around(z, np.full(frames, end))) for end in (0, 1))
            images = (1 - share[:, :, None, None]) * first + share[:, :, None, None] * last
        else:
            images = as_array(pair.decode(z))  # (frames, c, h, w)
        return as_stored(images), self._context.classifier(run).classify(images).argmax(axis=1)

    def _opened(self, run_name: str) -> tuple[run_pb2.Run, Codec]:
        """Return a run and its codec; raise NotReady while a pilot has not chosen its rendering."""
        run = self._context.catalog.run(run_name)
        if is_open(run.config):
            raise NotReady(f"{run.name} is being prepared; wait until it identifies", reason="NO_VAE")
        return run, self._context.codec(run.config)


def _check_images(run_name: str, pair: Codec, images: Array) -> None:
    channels, height, width = pair.image_shape
    if images.shape[1:] != (height, width, channels):
        raise InvalidInput(
            f"the VAE of {names.last(run_name)!r} takes images of {height}x{width}x{channels}, not "
            f"{'x'.join(str(size) for size in images.shape[1:])}"
        )


def _check_size(count: int, pair: Codec) -> None:
    most = MAX_IMAGE_BYTES // int(np.prod(pair.image_shape))
    if count > most:
        raise InvalidInput(f"{count} images are more than one answer holds; ask for at most {most} at a time")
