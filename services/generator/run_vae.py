"""The VAE of a run: uploaded, or trained once for all runs that share it."""

from collections.abc import Callable
from contextlib import suppress

from defuse.errors import Cancelled, NotFound, NotReady
from defuse.v1 import run_pb2

from services.generator import vae, vae_training
from services.generator.codec import Codec
from services.generator.run_context import DECODER, ENCODER, VAE, RunContext
from services.runtime.worker import Job
from services.storage import keys
from services.storage.catalog import LabelledImages

CHECKPOINTS = "checkpoints"
TRAINING_SHARE = 0.9
"""Share of a training in the progress of `prepare`."""


def run_codec(context: RunContext, run: run_pb2.Run, train: LabelledImages, job: Job) -> Codec:
    """Return the run's codec, uploaded or trained.

    It is made once for all runs that share it.
    """
    record_keys = {part: keys.vae(run.config, part) for part in (ENCODER, DECODER, VAE)}
    if run.config.vae.encoder_digest:
        if not context.store.exists(record_keys[DECODER]):
            _take_pair(context, run, record_keys)
        return context.codec(run.config)
    if not context.store.exists(record_keys[VAE]):
        context.store.create_bytes(record_keys[VAE], vae.to_bytes(_train_vae(context, run, train, job)))
        for key in _checkpoints(context, keys.vae(run.config, CHECKPOINTS)):
            context.store.remove(key)
    # All runs use the stored VAE, also when two workers trained it at once.
    stored = context.store.read_bytes(record_keys[VAE])
    for part, export in ((ENCODER, vae.encoder_onnx), (DECODER, vae.decoder_onnx)):
        if not context.store.exists(record_keys[part]):
            context.store.create_bytes(record_keys[part], export(vae.from_bytes(stored)))
    return context.codec(run.config)


def _take_pair(context: RunContext, run: run_pb2.Run, record_keys: dict[str, str]) -> None:
    context.uploaded_codec(run.config)  # raises for a pair that does not fit
    wanted = run.config.vae
    encoder, decoder = (
        context.store.read_bytes(keys.file(digest)) for digest in (wanted.encoder_digest, wanted.decoder_digest)
    )
    context.store.create_bytes(record_keys[ENCODER], encoder)
    context.store.create_bytes(record_keys[DECODER], decoder)


def _train_vae(context: RunContext, run: run_pb2.Run, train: LabelledImages, job: Job) -> vae.Vae:
    """Train the run's VAE, from the last checkpoint if there is one.

    A worker that died leaves a checkpoint.
    """
    prefix = keys.vae(run.config, CHECKPOINTS)

    def on_checkpoint(epoch: int, checkpoint: bytes) -> None:
        context.store.write_bytes(f"{prefix}/{epoch:05d}", checkpoint)
        for key in _checkpoints(context, prefix)[:-1]:
            context.store.remove(key)

    try:
        return vae_training.train_vae(
            train.images,
            vae_config(run.config.vae, train.images.shape),
            seed=run.config.vae.seed,
            device=context.device,
            on_epoch=_report(job),
            should_stop=job.cancelled,
            resume=_last_checkpoint(context, prefix),
            on_checkpoint=on_checkpoint,
        )
    except vae_training.TrainingCancelled as error:
        raise Cancelled(f"{run.name} was cancelled") from error
    except FloatingPointError as error:
        raise NotReady(
            f"the VAE cannot be trained on these images ({error}); try another vae.beta or vae.latent_dim, or bring an "
            "encoder and a decoder of your own",
            reason="VAE_DIVERGED",
        ) from error


def _checkpoints(context: RunContext, prefix: str) -> list[str]:
    """Return the keys of checkpoints, by ascending epoch.

    Partial ones of a killed worker are left out.
    """
    return [key for key in context.store.keys(prefix) if key.rsplit("/", 1)[-1].isdecimal()]


def _last_checkpoint(context: RunContext, prefix: str) -> tuple[int, bytes] | None:
    for key in reversed(_checkpoints(context, prefix)):
        with suppress(NotFound):  # another run that trains the same VAE went on and removed it
            return int(key.rsplit("/", 1)[-1]), context.store.read_bytes(key)
    return None


def vae_config(wanted: run_pb2.VaeConfig, images: tuple[int, ...]) -> vae.VaeConfig:
    """Return the VAE's configuration for training images of shape (n, h, w, c)."""
    count, height, width, channels = images
    given = {name: getattr(wanted, name) for name in ("latent_dim", "epochs", "beta", "max_side")}
    overrides = {name: value for name, value in given.items() if value}
    return vae.VaeConfig.for_shape((channels, height, width), count, **overrides)


def _report(job: Job) -> Callable[[vae_training.EpochReport], None]:
    def on_epoch(report: vae_training.EpochReport) -> None:
        note = f"training the VAE, epoch {report.epoch} of {report.epochs}, ELBO {report.elbo:.1f}"
        job.progress(TRAINING_SHARE * report.epoch / report.epochs, note, state=run_pb2.Run.STATE_PREPARING)

    return on_epoch
