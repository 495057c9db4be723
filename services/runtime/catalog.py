"""Where each record lies in the artifact store, and how it is read back.

The key of a record is its resource name, so a person finds in the store what the API names. Owners write: the gateway
`audit`, `files`, `datasets`, `runs/*/run.pb`, events and annotations; the generator `vaes`, `runs/*/sources`, plans and
results; the distiller regions; the corrector models and what a correction leaves.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from defuse import names
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import annotation_pb2, dataset_pb2, gate_pb2, guard_pb2, model_pb2, region_pb2, release_pb2, run_pb2

from services.runtime.artifacts import ArtifactStore
from services.runtime.groups import group

Array = npt.NDArray[Any]


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


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """One split, with labels as class ids of a model."""

    # (n, h, w, c) uint8
    images: Array
    # (n,) int64
    labels: Array


class Catalog:
    """Reads the records that more than one service needs."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store

    def model(self, name: str) -> model_pb2.Model:
        """Return a model with its present champion; raise NotFound for an unknown name."""
        try:
            message = self.store.read_message(model(names.check(name, "models/*")), model_pb2.Model)
        except NotFound as error:
            raise NotFound(
                f"there is no model {names.last(name)!r}; register it with `defuse models add`",
                reason="MODEL_NOT_FOUND",
            ) from error
        handed_over = release_pb2.Release.KIND_HANDED_OVER  # which changes nothing yet
        changes = [release for release in self.releases(name) if release.kind != handed_over]
        message.champion_version = changes[-1].version
        return message

    def releases(self, name: str) -> list[release_pb2.Release]:
        """Return the releases of a model, oldest first."""
        keys = self.store.keys(releases(name))
        return [self.store.read_message(key, release_pb2.Release) for key in keys if key.endswith(".pb")]

    def dataset(self, name: str) -> dataset_pb2.Dataset:
        """Return a data set; raise NotFound for an unknown name."""
        try:
            return self.store.read_message(dataset(names.check(name, "datasets/*")), dataset_pb2.Dataset)
        except NotFound as error:
            raise NotFound(f"there is no data set {names.last(name)!r}", reason="DATASET_NOT_FOUND") from error

    def verdict(self, name: str) -> gate_pb2.GateVerdict:
        """Return what the gate said; raise NotFound for an unknown name."""
        names.check(name, "models/*/verdicts/*")
        try:
            return self.store.read_message(verdict(name), gate_pb2.GateVerdict)
        except NotFound as error:
            raise NotFound(f"there is no verdict {names.last(name)!r}", reason="VERDICT_NOT_FOUND") from error

    def guard(self, name: str) -> guard_pb2.Guard:
        """Return a guard; raise NotFound for an unknown name."""
        names.check(name, "models/*/guards/*")
        try:
            return self.store.read_message(guard(name), guard_pb2.Guard)
        except NotFound as error:
            raise NotFound(f"there is no guard {names.last(name)!r}", reason="GUARD_NOT_FOUND") from error

    def guards(self, model_name: str) -> list[guard_pb2.Guard]:
        """Return the guards of a model, oldest first; NotFound for an unknown model."""
        keys = self.store.keys(f"{self.model(model_name).name}/guards")
        return [self.guard(key) for key in sorted(keys, key=lambda key: int(names.last(key)))]

    def run(self, name: str) -> run_pb2.Run:
        """Return a run as it was created; raise NotFound for an unknown name."""
        try:
            return self.store.read_message(run(names.check(name, "runs/*")), run_pb2.Run)
        except NotFound as error:
            raise NotFound(f"there is no run {names.last(name)!r}", reason="RUN_NOT_FOUND") from error

    def runs_of(self, model_name: str) -> list[run_pb2.Run]:
        """Return the runs of a model as they were created, by name."""
        keys = [run(key) for key in self.store.keys("runs")]
        runs = [self.store.read_message(key, run_pb2.Run) for key in keys if self.store.exists(key)]
        return [one for one in runs if one.config.model == model_name]

    def region(self, name: str) -> region_pb2.Region:
        """Return a region, or a part of one, as the distiller left it; raise NotFound for an unknown name."""
        names.check(name, "runs/*/regions/*")
        run_name = names.parent(name)
        self.run(run_name)
        whole, _, _ = names.last(name).rpartition("-")  # nothing, unless it is a part
        regions = self.parts(names.region(names.last(run_name), whole)) if whole else []
        regions = regions or self._distilled(distillation(run_name))
        for region in regions:
            if region.name == name:
                return region
        known = ", ".join(names.last(region.name) for region in regions) or "none"
        raise NotFound(
            f"run {names.last(run_name)!r} has no region {names.last(name)!r}; it has: {known}",
            reason="REGION_NOT_FOUND",
        )

    def regions(self, run_name: str) -> list[region_pb2.Region]:
        """Return the regions of a run with their latest annotations, largest score first; none until it is distilled.

        Of a region whose latest verdict is mixed its parts are among them, and theirs: a verdict that is taken back
        takes them back.
        """
        listed = [one for region in self._distilled(distillation(run_name)) for one in self._with_parts(region)]
        return sorted(listed, key=lambda region: -region.score)

    def annotated(self, region: region_pb2.Region) -> region_pb2.Region:
        """Return the region with its latest annotation, where it has one."""
        keys = [key for key in self.store.keys(annotations(region.name)) if key.endswith(".pb")]
        if keys:
            region.annotation.CopyFrom(self.store.read_message(keys[-1], annotation_pb2.Annotation))
        return region

    def parts(self, region_name: str) -> list[region_pb2.Region]:
        """Return the parts that a region was split into, largest score first; none where it was not split."""
        return self._distilled(parts(region_name))

    def failures(self, run_name: str, round_: int, shard: int) -> dict[str, Array]:
        """Return what one shard found in one round, as arrays by the names of the contract."""
        return group(self.store.read_arrays(shard_result(run_name, round_, shard)), "failures")

    def all_failures(self, run_name: str) -> dict[str, Array]:
        """Return what a finished search found, shard by shard and round by round."""
        keys = [key for key in self.store.keys(f"{run_name}/results") if key.endswith(".safetensors")]
        found = [group(self.store.read_arrays(key), "failures") for key in keys]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def region_failures(self, run_name: str, region_names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Yield of each region of a run its failures, held-out ones too, in the order of sources, rounds and draws."""
        found = self.all_failures(run_name)
        # A region's file has their latents alone, which no two failures share.
        row_of = {latent.tobytes(): row for row, latent in enumerate(found["latent"])}
        for region_name in region_names:
            arrays = self.store.map_arrays(region_arrays(region_name))
            latents = [latent for name in ("latent", "held_out_latent") for latent in np.array(arrays[name])]
            rows = np.array([row_of[latent.tobytes()] for latent in latents])
            rows = rows[np.lexsort([found[name][rows] for name in ("draw", "round", "source")])]
            yield {name: array[rows] for name, array in found.items()}

    def split(self, dataset_name: str, split_name: str, model: model_pb2.Model) -> LabelledImages:
        """Return a split with its labels as the model's class ids; images stay on disk until they are used."""
        arrays = self.store.map_arrays(split(dataset_name, split_name))
        table = label_map(self.dataset(dataset_name), model)
        return LabelledImages(images=arrays["x"], labels=table[arrays["y"]])

    def _with_parts(self, region: region_pb2.Region) -> Iterator[region_pb2.Region]:
        yield self.annotated(region)
        if region.annotation.verdict == annotation_pb2.Annotation.VERDICT_MIXED:
            for part in self.parts(region.name):
                yield from self._with_parts(part)

    def _distilled(self, key: str) -> list[region_pb2.Region]:
        try:
            return list(self.store.read_message(key, region_pb2.Distillation).regions)
        except NotFound:
            return []  # not distilled or not split yet


def check_fit(model: model_pb2.Model, dataset: dataset_pb2.Dataset) -> None:
    """Raise InvalidInput unless a data set has images and labels that a model takes and gives."""
    label_map(dataset, model)
    if list(model.image_shape) != list(dataset.image_shape):
        raise InvalidInput(
            f"model {names.last(model.name)!r} takes images of {shape(model.image_shape)}, the data set has "
            f"{shape(dataset.image_shape)}; bring images of the model's size",
            reason="IMAGE_SHAPE_MISMATCH",
        )


def shape(sizes: Iterable[int]) -> str:
    """Return sizes as people write them: 28x28x1."""
    return "x".join(str(size) for size in sizes)


def label_map(dataset: dataset_pb2.Dataset, model: model_pb2.Model) -> npt.NDArray[np.int64]:
    """Return the model's class id for each label of a data set.

    Class names decide where the data set has any; folders named by number and plain ids are class ids. Raises
    InvalidInput for labels that the model does not have.
    """
    count = len(model.classes)
    if dataset.classes and set(dataset.classes) <= set(model.classes):
        return np.array([list(model.classes).index(name) for name in dataset.classes], np.int64)
    if all(name.isdecimal() for name in dataset.classes):
        ids = [int(name) for name in dataset.classes] or list(range(dataset.label_count))
        unknown = [str(value) for value in ids if value >= count]
    else:
        ids, unknown = [], sorted(set(dataset.classes) - set(model.classes))
    if unknown:
        raise InvalidInput(
            f"the data set has labels that model {names.last(model.name)!r} does not have: {', '.join(unknown[:10])}; "
            f"the model's classes are {', '.join(model.classes[:20])}",
            reason="LABELS_OUTSIDE_CLASSES",
        )
    return np.array(ids, np.int64)
