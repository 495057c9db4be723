"""What a run would cost, from a second or two of the real work: the served classifier, a VAE of the right size."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from defuse.v1 import run_pb2

from services.arrays import Array
from services.generator import codec, pipeline, vae, vae_training
from services.generator.codec import Codec
from services.generator.preparation import vae_config
from services.generator.run_context import DECODER, RunContext
from services.storage import keys

_WARM_UP, _MEASURED = 2, 6  # batches


@dataclass(frozen=True, kw_only=True)
class _LatentBatch:
    z: Array


def estimate(context: RunContext, config: run_pb2.RunConfig) -> run_pb2.CostEstimate:
    """Measure a few batches of training and of search; nothing is stored."""
    run = run_pb2.Run(config=config)
    context.use_all_threads()
    available = len(context.images(run, keys.SEARCHED_SPLIT).labels)
    sources = min(config.search.max_sources or available, available)
    decodes = sources * config.search.draws_per_source
    pair, training_s = _codec(context, run)
    rate = _decodes_per_s(context, run, pair)
    # Each source is read as an image and as a reconstruction first.
    return run_pb2.CostEstimate(
        sources=sources,
        decodes=decodes,
        decodes_per_s=rate,
        training_s=training_s,
        search_s=(decodes + 2 * sources) / rate,
    )


def _codec(context: RunContext, run: run_pb2.Run) -> tuple[Codec, float]:
    """Return the run's codec, or an untrained one of its size, and the seconds that training would take."""
    if run.config.vae.encoder_digest:
        return context.given_codec(run.config), 0.0
    if context.store.exists(keys.vae(run.config, DECODER)):
        return context.codec(run.config), 0.0
    train = context.images(run, "train")
    config = vae_config(run.config.vae, train.images.shape)
    sample = np.array(train.images[: 8 * config.batch_size])
    per_image = vae_training.seconds_per_image(sample, config, device=context.device)
    untrained = vae.new_vae(config, torch.Generator().manual_seed(0))
    return codec.vae_codec(untrained, context.device), per_image * len(train.labels) * config.epochs


def _decodes_per_s(context: RunContext, run: run_pb2.Run, pair: Codec) -> float:
    size = run.config.search.batch_size
    z = np.random.default_rng(0).standard_normal((size, pair.latent_dim)).astype(np.float32)

    submit = context.classifier(run).submit
    for _ in pipeline.classified(_WARM_UP * [_LatentBatch(z=z)], pair.decode, submit, context.decoders):
        pass
    begin = time.perf_counter()
    for _ in pipeline.classified(_MEASURED * [_LatentBatch(z=z)], pair.decode, submit, context.decoders):
        pass
    return size * _MEASURED / (time.perf_counter() - begin)
