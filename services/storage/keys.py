"""Where each record lies in the artifact store.

The key of a record is its resource name, so a person finds in the store what the API names. Owners write: the gateway
`audit`, `files`, `datasets`, `runs/*/run.pb`, events and annotations; the generator `vaes`, `runs/*/sources`, plans and
results; the distiller regions; the corrector models and what a correction leaves.
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
    """Digests of all candidates of a model, by number."""
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
    """The searched images of a run, and the scale of its latents."""
    return f"{run_name}/sources.safetensors"


def shard_sources(run_name: str, shard: int) -> str:
    """Posteriors of one shard's sources, and their margins."""
    return f"{run_name}/sources/{shard:05d}.safetensors"


def vae(config: run_pb2.RunConfig, part: str) -> str:
    """A part of a run's VAE.

    Runs with the same data and the same VAE configuration share it.
    """
    identity = config.dataset.encode() + b"|" + config.vae.SerializeToString(deterministic=True)
    return f"vaes/{hashlib.sha256(identity).hexdigest()[:16]}/{part}"


def label_model(config: run_pb2.RunConfig) -> str:
    """The label model.

    Shared by runs with the same VAE, seed and model classes.
    """
    return vae(config, f"{names.last(config.model)}-{config.seed}/label_model.safetensors")


def label_model_onnx(config: run_pb2.RunConfig) -> str:
    """The label model for other services: latents (n, d) to probabilities (n, k)."""
    return vae(config, f"{names.last(config.model)}-{config.seed}/label_model.onnx")


def reference(config: run_pb2.RunConfig) -> str:
    """Labelled training images in latent space; shared like the label model."""
    return vae(config, f"{names.last(config.model)}-{config.seed}/reference.safetensors")


def preflight(run_name: str) -> str:
    return f"{run_name}/preflight.pb"


def plan(run_name: str, round_: int) -> str:
    """The allocation of a round, and the sums of all earlier rounds."""
    return f"{run_name}/plans/{round_:03d}.safetensors"


def shard_result(run_name: str, round_: int, shard: int) -> str:
    """The results of one shard in one round.

    Failures, statistics for the next plan, counts.
    """
    return f"{run_name}/results/{round_:03d}-{shard:05d}.safetensors"


def distillation(run_name: str) -> str:
    return f"{run_name}/distillation.pb"


def region_arrays(region_name: str) -> str:
    return f"{region_name}/region.safetensors"


def region_parts(region_name: str) -> str:
    """The parts of a split region."""
    return f"{region_name}/parts.pb"


def annotations(region_name: str) -> str:
    return f"{region_name}/annotations"


def correction(name: str) -> str:
    return f"{name}/correction.pb"


def verdict(name: str) -> str:
    """A verdict of the gate."""
    return f"{name}/verdict.pb"


def guard(name: str) -> str:
    """The record of a guard."""
    return f"{name}/guard.pb"


def guard_reference(name: str) -> str:
    """The reference profile.

    Scores of the test split by a guard and by the version that its run searched.
    """
    return f"{name}/reference.safetensors"


def observed_hours(model_name: str) -> str:
    """The hours with reported observations."""
    return f"{model_name}/observations"


def observations(model_name: str, hour: str) -> str:
    """Batches reported within an hour, `2026-11-26-14`, UTC."""
    return f"{observed_hours(model_name)}/{hour}"


def batch_record(batch: str) -> str:
    """The observations of a batch without images, an ObservationBatch.

    `batch` is its key below `observations`. Written last of a report: a batch exists once this is there.
    """
    return f"{batch}/reported.pb"


def observed_images(batch: str) -> str:
    """Images and scores of a batch, in the report's order.

    `id` (n, 16) uint8 names the rows by `observation_digest`; `has_image` (n,) bool, `image` (m, h, w, c) uint8 for the
    m rows with an image; `has_scores` (n,) bool, `scores` (n, k) float32, zeros in rows without scores.
    """
    return f"{batch}/images.safetensors"


def truths(batch: str) -> str:
    """Ground truth of a batch, in the order of the keys.

    The latest statement counts. Each is an ObservationBatch whose observations have `id` and `truth` only.
    """
    return f"{batch}/truths"


def truth(batch: str, moment: datetime, unique: str) -> str:
    return f"{truths(batch)}/{moment:%Y%m%d%H%M%S.%f}-{unique}.pb"


def observation_digest(observation_id: str) -> bytes:
    """Return the 16 bytes that name an observation's row."""
    return hashlib.sha256(observation_id.encode()).digest()[:16]


def monitor_config(model_name: str) -> str:
    """The monitor configuration of a model."""
    return f"{model_name}/monitor/config.pb"


def observation_scores(batch: str) -> str:
    """The scores of a batch: region index, inside, risk, typicality, latent.

    Predicted class and confidence. `id` names its rows as in `observed_images`, so that a row can be removed
    independently of earlier removals.
    """
    return f"{batch}/watched.safetensors"


def alerts(model_name: str) -> str:
    """The alerts of a model; their names sort by time."""
    return f"{model_name}/alerts"


def alert(name: str) -> str:
    """The record of an alert."""
    return f"{name}/alert.pb"


def trial(name: str) -> str:
    """The record of a trial."""
    return f"{name}/trial.pb"


def audit_event(moment: datetime, unique: str) -> str:
    """An audit event.

    One folder a day, with keys that sort by time.
    """
    return f"{AUDIT}/{moment:%Y-%m-%d}/{moment:%H%M%S.%f}-{unique}.pb"


def regression_images(model_name: str, region_name: str, label: str) -> str:
    """Images of a labelled region in its model's regression bank."""
    run, region = names.last(names.parent(region_name)), names.last(region_name)
    return f"{model_name}/bank/{run}/{region}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.safetensors"


def corrected_file(correction_name: str) -> str:
    """The ONNX file of a candidate."""
    return onnx_file(correction_name)


def corrected_weights(correction_name: str) -> str:
    """The state dict of a candidate from a torch factory."""
    return weights_file(correction_name)


def training(correction_name: str, position: int) -> str:
    """The results of one training of a correction."""
    return f"{correction_name}/trainings/{position:03d}/training.pb"


def checkpoint(correction_name: str, position: int) -> str:
    return f"{correction_name}/trainings/{position:03d}/checkpoint.safetensors"


def point(correction_name: str, position: int, number: int) -> str:
    """The key prefix of the files of one point of a training."""
    return f"{correction_name}/trainings/{position:03d}/{number:02d}"


def onnx_file(prefix: str) -> str:
    return f"{prefix}/model.onnx"


def weights_file(prefix: str) -> str:
    return f"{prefix}/weights.safetensors"
