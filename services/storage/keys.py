"""Where each record lies in the artifact store.

The key of a record is its resource name, so a person finds in the store what the API names. Owners write: the gateway
`audit`, `files`, `datasets`, `runs/*/run.pb`, events and annotations; the generator `vaes`, `runs/*/sources`, plans and
results; the distiller regions; the corrector models and what a correction leaves.
"""

import hashlib
from datetime import datetime

from defuse import names
from defuse.v1 import run_pb2

# The split that runs search: the test split stays unseen.
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
    """Digests of the candidates that a model ever had, by their numbers."""
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
    """Which images a run searches, and the scale of its latents."""
    return f"{run_name}/sources.safetensors"


def shard_sources(run_name: str, shard: int) -> str:
    """Posteriors of the sources of one shard, and how the classifier reads them unperturbed."""
    return f"{run_name}/sources/{shard:05d}.safetensors"


def vae(config: run_pb2.RunConfig, part: str) -> str:
    """A part of the VAE that a run uses: runs on the same data with the same VAE configuration share one."""
    identity = config.dataset.encode() + b"|" + config.vae.SerializeToString(deterministic=True)
    return f"vaes/{hashlib.sha256(identity).hexdigest()[:16]}/{part}"


def label_model(config: run_pb2.RunConfig) -> str:
    """What validity is told from depends on VAE, seed and the model's classes: runs that share them share it."""
    return vae(config, f"{names.last(config.model)}-{config.seed}/label_model.safetensors")


def label_model_onnx(config: run_pb2.RunConfig) -> str:
    """The label model as others read it: latents (n, d) to probabilities (n, k)."""
    return vae(config, f"{names.last(config.model)}-{config.seed}/label_model.onnx")


def reference(config: run_pb2.RunConfig) -> str:
    """Labelled training images in latent space; shared like the label model."""
    return vae(config, f"{names.last(config.model)}-{config.seed}/reference.safetensors")


def preflight(run_name: str) -> str:
    return f"{run_name}/preflight.pb"


def plan(run_name: str, round_: int) -> str:
    """How many perturbations of each source a round decodes, and what all rounds before it gave."""
    return f"{run_name}/plans/{round_:03d}.safetensors"


def shard_result(run_name: str, round_: int, shard: int) -> str:
    """What one shard gave in one round: failures, what the next plan is made of, and counts."""
    return f"{run_name}/results/{round_:03d}-{shard:05d}.safetensors"


def distillation(run_name: str) -> str:
    return f"{run_name}/distillation.pb"


def region_arrays(region_name: str) -> str:
    return f"{region_name}/region.safetensors"


def parts(region_name: str) -> str:
    """What a region that shows several classes was split into."""
    return f"{region_name}/parts.pb"


def annotations(region_name: str) -> str:
    return f"{region_name}/annotations"


def correction(name: str) -> str:
    return f"{name}/correction.pb"


def verdict(name: str) -> str:
    """What the gate said of a candidate."""
    return f"{name}/verdict.pb"


def guard(name: str) -> str:
    """What is known of a guard."""
    return f"{name}/guard.pb"


def guard_reference(name: str) -> str:
    """What a guard, and the version that its run searched, say of the test split: what calm traffic looks like."""
    return f"{name}/reference.safetensors"


def observed_hours(model_name: str) -> str:
    """The hours in which something was reported."""
    return f"{model_name}/observations"


def observations(model_name: str, hour: str) -> str:
    """Batches that were reported within an hour, `2026-11-26-14`, UTC."""
    return f"{observed_hours(model_name)}/{hour}"


def reported(batch: str) -> str:
    """What was reported, an ObservationBatch without images; `batch` is the key of a batch below `observations`.

    Written last of what is reported: a batch exists once it is there.
    """
    return f"{batch}/reported.pb"


def observed_images(batch: str) -> str:
    """Images and scores of a batch of n, in the order of what was reported.

    `id` (n, 16) uint8 names the rows by what `observation_digest` gives; `has_image` (n,) bool, `image` (m, h, w, c)
    uint8: of the m rows that have one; `has_scores` (n,) bool, `scores` (n, k) float32, zeros where there are none.
    """
    return f"{batch}/images.safetensors"


def truths(batch: str) -> str:
    """What was said afterwards that observations of a batch show, in the order of the keys: the last word counts.

    Each is an ObservationBatch whose observations have `id` and `truth` alone.
    """
    return f"{batch}/truths"


def truth(batch: str, moment: datetime, unique: str) -> str:
    return f"{truths(batch)}/{moment:%Y%m%d%H%M%S.%f}-{unique}.pb"


def observation_digest(observation_id: str) -> bytes:
    """What names the row of an observation in the arrays of its batch; 16 bytes."""
    return hashlib.sha256(observation_id.encode()).digest()[:16]


def monitor_config(model_name: str) -> str:
    """How the traffic of a model is watched."""
    return f"{model_name}/monitor/config.pb"


def watched(batch: str) -> str:
    """What a guard says of a batch: region index, inside, risk, typicality, latent; and what its scores say.

    `id` names its rows as in `observed_images`, so that a row can be taken out whatever was taken out before.
    """
    return f"{batch}/watched.safetensors"


def alerts(model_name: str) -> str:
    """The alerts of a model; their names sort by time."""
    return f"{model_name}/alerts"


def alert(name: str) -> str:
    """An alert."""
    return f"{name}/alert.pb"


def trial(name: str) -> str:
    """A trial of a candidate on live requests."""
    return f"{name}/trial.pb"


def audit_event(moment: datetime, unique: str) -> str:
    """Something that a caller changed: a folder a day, whose keys sort by time."""
    return f"{AUDIT}/{moment:%Y-%m-%d}/{moment:%H%M%S.%f}-{unique}.pb"


def banked_region(model_name: str, region_name: str, label: str) -> str:
    """Images of a labelled region, kept as a test of its model."""
    run, region = names.last(names.parent(region_name)), names.last(region_name)
    return f"{model_name}/bank/{run}/{region}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.safetensors"


def corrected_file(correction_name: str) -> str:
    """The candidate."""
    return onnx_of(correction_name)


def corrected_weights(correction_name: str) -> str:
    """The state dict of a candidate whose classifier came from a torch factory."""
    return weights_of(correction_name)


def training(correction_name: str, position: int) -> str:
    """What one training of a correction gave."""
    return f"{correction_name}/trainings/{position:03d}/training.pb"


def checkpoint(correction_name: str, position: int) -> str:
    return f"{correction_name}/trainings/{position:03d}/checkpoint.safetensors"


def point(correction_name: str, position: int, number: int) -> str:
    """What the files of one point of a training begin with."""
    return f"{correction_name}/trainings/{position:03d}/{number:02d}"


def onnx_of(prefix: str) -> str:
    return f"{prefix}/model.onnx"


def weights_of(prefix: str) -> str:
    return f"{prefix}/weights.safetensors"
