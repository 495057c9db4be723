"""The keys of all records in the artifact store.

The key of a record is its resource name, so a person finds in the store what the API
names. Each service writes its own records: the gateway `audit`, `files`, `datasets`,
`runs/*/run.pb`, events and annotations; the generator `vaes`, `runs/*/sources`, plans
and results; the distiller regions; the corrector models and the files of a correction.
"""

import hashlib
from datetime import datetime

from defuse import names
from defuse.v1 import run_pb2

# The split that runs search; the test split stays unseen.
SEARCHED_SPLIT = "val"
AUDIT = "audit"


def file(digest: str) -> str:
    return f"files/{digest}"


def model(name: str) -> str:
    return f"{name}/model.pb"


def model_file(name: str, version: int) -> str:
    return f"{names.model_version(name, version)}/model.onnx"


def model_version(name: str, version: int) -> str:
    return f"{names.model_version(name, version)}/version.pb"


def releases(name: str) -> str:
    return f"{name}/releases"


def candidates(name: str) -> str:
    """Return the key prefix of the numbered digests of a model's candidates."""
    return f"{name}/candidates"


def dataset(name: str) -> str:
    return f"{name}/dataset.pb"


def split(name: str, split_name: str) -> str:
    return f"{name}/{split_name}.safetensors"


def run(name: str) -> str:
    return f"{name}/run.pb"


def event(name: str, key: str) -> str:
    return f"{name}/events/{key}.pb"


def sources(run_name: str) -> str:
    """Return the key of a run's searched images and its latents' scale."""
    return f"{run_name}/sources.safetensors"


def shard_sources(run_name: str, shard: int) -> str:
    """Return the key of the posteriors and margins of one shard's sources."""
    return f"{run_name}/sources/{shard:05d}.safetensors"


def vae(config: run_pb2.RunConfig, part: str) -> str:
    """Return the key of a part of a run's VAE.

    Runs with the same data and the same VAE configuration share the VAE.
    """
    identity = config.dataset.encode() + b"|" + config.vae.SerializeToString(deterministic=True)
    return f"vaes/{hashlib.sha256(identity).hexdigest()[:16]}/{part}"


def label_model(config: run_pb2.RunConfig) -> str:
    """Return the key of the label model, of latents or of images.

    Runs with the same VAE, seed and model classes share it.
    """
    return _label_model(config, "safetensors")


def label_model_onnx(config: run_pb2.RunConfig) -> str:
    """Return the key of the label model for other services.

    It maps latents (n, d) or images (n, c, h, w) to probabilities (n, k).
    """
    return _label_model(config, "onnx")


def _label_model(config: run_pb2.RunConfig, suffix: str) -> str:
    of_images = config.validity.label_model == run_pb2.ValidityConfig.LABEL_MODEL_IMAGE
    name = "image_label_model" if of_images else "label_model"
    return vae(config, f"{names.last(config.model)}-{config.seed}/{name}.{suffix}")


def reference(config: run_pb2.RunConfig) -> str:
    """Return the key of the labelled training images in latent space.

    They are shared as the label model is.
    """
    return vae(config, f"{names.last(config.model)}-{config.seed}/reference.safetensors")


def settled_config(run_name: str) -> str:
    """Return the key of a run's configuration, with what its pilot decided."""
    return f"{run_name}/config.pb"


def pilot(run_name: str) -> str:
    return f"{run_name}/pilot.pb"


def preflight(run_name: str) -> str:
    return f"{run_name}/preflight.pb"


def plan(run_name: str, round_: int) -> str:
    """Return the key of a round's allocation and the earlier rounds' sums."""
    return f"{run_name}/plans/{round_:03d}.safetensors"


def shard_result(run_name: str, round_: int, shard: int) -> str:
    """Return the key of the results of one shard in one round.

    They are failures, statistics for the next plan, and counts.
    """
    return f"{run_name}/results/{round_:03d}-{shard:05d}.safetensors"


def distillation(run_name: str) -> str:
    return f"{run_name}/distillation.pb"


def region_arrays(region_name: str) -> str:
    return f"{region_name}/region.safetensors"


def region_parts(region_name: str) -> str:
    """Return the key of the parts of a split region."""
    return f"{region_name}/parts.pb"


def annotations(region_name: str) -> str:
    return f"{region_name}/annotations"


def correction(name: str) -> str:
    return f"{name}/correction.pb"


def verdict(name: str) -> str:
    """Return the key of a verdict of the gate."""
    return f"{name}/verdict.pb"


def guard(name: str) -> str:
    """Return the key of the record of a guard."""
    return f"{name}/guard.pb"


def guard_reference(name: str) -> str:
    """Return the key of a guard's reference profile.

    The profile has scores of the test split by the guard and by the version that its run searched.
    """
    return f"{name}/reference.safetensors"


def observed_hours(model_name: str) -> str:
    """Return the key prefix of the hours with reported observations."""
    return f"{model_name}/observations"


def observations(model_name: str, hour: str) -> str:
    """Return the key prefix of the batches reported within an hour.

    An hour is `2026-11-26-14`, in UTC.
    """
    return f"{observed_hours(model_name)}/{hour}"


def batch_record(batch: str) -> str:
    """Return the key of a batch's observations without images.

    They are an ObservationBatch. `batch` is the key of the batch below `observations`.
    The record is the last part of a report to be written: a batch exists once its
    record does.
    """
    return f"{batch}/reported.pb"


def observed_images(batch: str) -> str:
    """Return the key of the images and scores of a batch.

    They are in the report's order. `id` (n, 16) uint8 names the rows by `observation_digest`; `has_image` (n,) bool,
    `image` (m, h, w, c) uint8 for the m rows with an image; `has_scores` (n,) bool, `scores` (n, k) float32, zeros in
    rows without scores.
    """
    return f"{batch}/images.safetensors"


def truths(batch: str) -> str:
    """Return the key prefix of a batch's ground truth.

    Each object is an ObservationBatch whose observations have `id` and `truth` only. The latest statement about an
    observation counts, in the order of the keys.
    """
    return f"{batch}/truths"


def truth(batch: str, moment: datetime, unique: str) -> str:
    return f"{truths(batch)}/{moment:%Y%m%d%H%M%S.%f}-{unique}.pb"


def observation_digest(observation_id: str) -> bytes:
    """Return the 16 bytes that name an observation's row."""
    return hashlib.sha256(observation_id.encode()).digest()[:16]


def monitor_config(model_name: str) -> str:
    """Return the key of a model's monitor configuration."""
    return f"{model_name}/monitor/config.pb"


def observation_scores(batch: str) -> str:
    """Return the key of the scores of a batch.

    They are region index, inside, risk, typicality, latent, predicted class and confidence. `id` names the rows as in
    `observed_images`, so that a row can be removed independently of earlier removals.
    """
    return f"{batch}/watched.safetensors"


def alerts(model_name: str) -> str:
    """Return the key prefix of a model's alerts.

    The names of alerts sort by time.
    """
    return f"{model_name}/alerts"


def alert(name: str) -> str:
    """Return the key of the record of an alert."""
    return f"{name}/alert.pb"


def trial(name: str) -> str:
    """Return the key of the record of a trial."""
    return f"{name}/trial.pb"


def audit_event(moment: datetime, unique: str) -> str:
    """Return the key of an audit event.

    Each day has a folder, and keys sort by time.
    """
    return f"{AUDIT}/{moment:%Y-%m-%d}/{moment:%H%M%S.%f}-{unique}.pb"


def regression_images(model_name: str, region_name: str, label: str) -> str:
    """Return the key of a labelled region's images in the regression bank."""
    run, region = names.last(names.parent(region_name)), names.last(region_name)
    return f"{model_name}/bank/{run}/{region}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.safetensors"


def corrected_file(correction_name: str) -> str:
    """Return the key of a candidate's ONNX file."""
    return onnx_file(correction_name)


def corrected_weights(correction_name: str) -> str:
    """Return the key of a candidate's state dict.

    Only candidates from a torch factory have one.
    """
    return weights_file(correction_name)


def training(correction_name: str, position: int) -> str:
    """Return the key of the results of one training of a correction."""
    return f"{correction_name}/trainings/{position:03d}/training.pb"


def checkpoint(correction_name: str, position: int) -> str:
    return f"{correction_name}/trainings/{position:03d}/checkpoint.safetensors"


def point(correction_name: str, position: int, number: int) -> str:
    """Return the key prefix of the files of a training's point."""
    return f"{correction_name}/trainings/{position:03d}/{number:02d}"


def onnx_file(prefix: str) -> str:
    return f"{prefix}/model.onnx"


def weights_file(prefix: str) -> str:
    return f"{prefix}/weights.safetensors"
