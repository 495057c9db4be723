"""The catalog, which reads the records that several services need, and the settled configuration of a run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from defuse import names
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import (
    annotation_pb2,
    dataset_pb2,
    gate_pb2,
    guard_pb2,
    model_pb2,
    region_pb2,
    release_pb2,
    run_pb2,
    tensor_pb2,
)

from services.arrays import Array
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import select_group


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A split of a data set, labelled by a model's class ids."""

    # (n, h, w, c) uint8
    images: Array
    # (n,) int64
    labels: Array


class Catalog:
    """Reads the records that several services need."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store

    def model(self, name: str) -> model_pb2.Model:
        """Return a model with its champion; raise NotFound for an unknown name."""
        try:
            message = self.store.read_message(keys.model(names.check(name, "models/*")), model_pb2.Model)
        except NotFound as error:
            raise NotFound(
                f"there is no model {names.last(name)!r}; register it with `defuse models add`",
                reason="MODEL_NOT_FOUND",
            ) from error
        handed_over = release_pb2.Release.KIND_HANDED_OVER  # a handed-over version changes nothing yet
        changes = [release for release in self.releases(name) if release.kind != handed_over]
        message.champion_version = changes[-1].version
        return message

    def releases(self, name: str) -> list[release_pb2.Release]:
        """Return the releases of a model, oldest first."""
        found = [key for key in self.store.keys(keys.releases(name)) if key.endswith(".pb")]
        return [self.store.read_message(key, release_pb2.Release) for key in found]

    def dataset(self, name: str) -> dataset_pb2.Dataset:
        """Return a data set; raise NotFound for an unknown name."""
        try:
            return self.store.read_message(keys.dataset(names.check(name, "datasets/*")), dataset_pb2.Dataset)
        except NotFound as error:
            raise NotFound(f"there is no data set {names.last(name)!r}", reason="DATASET_NOT_FOUND") from error

    def verdict(self, name: str) -> gate_pb2.GateVerdict:
        """Return a verdict of the gate; raise NotFound for an unknown name."""
        names.check(name, "models/*/verdicts/*")
        try:
            return self.store.read_message(keys.verdict(name), gate_pb2.GateVerdict)
        except NotFound as error:
            raise NotFound(f"there is no verdict {names.last(name)!r}", reason="VERDICT_NOT_FOUND") from error

    def guard(self, name: str) -> guard_pb2.Guard:
        """Return a guard; raise NotFound for an unknown name."""
        names.check(name, "models/*/guards/*")
        try:
            return self.store.read_message(keys.guard(name), guard_pb2.Guard)
        except NotFound as error:
            raise NotFound(f"there is no guard {names.last(name)!r}", reason="GUARD_NOT_FOUND") from error

    def guards(self, model_name: str) -> list[guard_pb2.Guard]:
        """Return the guards of a model, oldest first.

        Raises NotFound for an unknown model.
        """
        found = self.store.keys(f"{self.model(model_name).name}/guards")
        return [self.guard(key) for key in sorted(found, key=lambda key: int(names.last(key)))]

    def run(self, name: str) -> run_pb2.Run:
        """Return a run as it was created, with what its pilot decided.

        Raises NotFound for an unknown name.
        """
        try:
            run = self.store.read_message(keys.run(names.check(name, "runs/*")), run_pb2.Run)
        except NotFound as error:
            raise NotFound(f"there is no run {names.last(name)!r}", reason="RUN_NOT_FOUND") from error
        return self._settled(run)

    def runs_of(self, model_name: str) -> list[run_pb2.Run]:
        """Return the runs of a model as they were created, by name."""
        found = [keys.run(name) for name in self.store.keys("runs")]
        runs = [self.store.read_message(key, run_pb2.Run) for key in found if self.store.exists(key)]
        return [self._settled(one) for one in runs if one.config.model == model_name]

    def region(self, name: str) -> region_pb2.Region:
        """Return a region or a part of one, without annotations.

        Raises NotFound for an unknown name.
        """
        names.check(name, "runs/*/regions/*")
        run_name = names.parent(name)
        self.run(run_name)
        whole, _, _ = names.last(name).rpartition("-")  # empty unless it is a part
        regions = self.parts(names.region(names.last(run_name), whole)) if whole else []
        regions = regions or self._distilled(keys.distillation(run_name))
        for region in regions:
            if region.name == name:
                return region
        known = ", ".join(names.last(region.name) for region in regions) or "none"
        raise NotFound(
            f"run {names.last(run_name)!r} has no region {names.last(name)!r}; it has: {known}",
            reason="REGION_NOT_FOUND",
        )

    def regions(self, run_name: str) -> list[region_pb2.Region]:
        """Return the annotated regions of a run, largest score first.

        The list is empty before the run is distilled. It includes the parts of mixed regions, recursively. A mixed
        region that is annotated otherwise loses its parts.
        """
        listed = [one for region in self._distilled(keys.distillation(run_name)) for one in self._with_parts(region)]
        return sorted(listed, key=lambda region: -region.score)

    def annotated(self, region: region_pb2.Region) -> region_pb2.Region:
        """Return the region with its latest annotation, when it has one."""
        given = [key for key in self.store.keys(keys.annotations(region.name)) if key.endswith(".pb")]
        if given:
            region.annotation.CopyFrom(self.store.read_message(given[-1], annotation_pb2.Annotation))
        return region

    def parts(self, region_name: str) -> list[region_pb2.Region]:
        """Return the parts of a split region, largest score first.

        Other regions have none.
        """
        return self._distilled(keys.region_parts(region_name))

    def failures(self, run_name: str, round_: int, shard: int) -> dict[str, Array]:
        """Return one shard's failures in one round, as arrays.

        The names of the arrays are the contract's fields.
        """
        return select_group(self.store.read_arrays(keys.shard_result(run_name, round_, shard)), "failures")

    def all_failures(self, run_name: str) -> dict[str, Array]:
        """Return all failures of a finished search, by shard and round."""
        results = [key for key in self.store.keys(f"{run_name}/results") if key.endswith(".safetensors")]
        found = [select_group(self.store.read_arrays(key), "failures") for key in results]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def region_failures(self, run_name: str, region_names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Yield the failures of each region, held-out ones included.

        They are sorted by source, round and draw.
        """
        found = self.all_failures(run_name)
        # A region's file has the latents alone, which identify failures.
        row_of = {latent.tobytes(): row for row, latent in enumerate(found["latent"])}
        for region_name in region_names:
            arrays = self.store.map_arrays(keys.region_arrays(region_name))
            latents = [latent for name in ("latent", "held_out_latent") for latent in np.array(arrays[name])]
            rows = np.array([row_of[latent.tobytes()] for latent in latents])
            rows = rows[np.lexsort([found[name][rows] for name in ("draw", "round", "source")])]
            yield {name: array[rows] for name, array in found.items()}

    def split(self, dataset_name: str, split_name: str, model: model_pb2.Model) -> LabelledImages:
        """Return a split with labels as the model's class ids.

        Images are read from disk on use.
        """
        arrays = self.store.map_arrays(keys.split(dataset_name, split_name))
        table = label_map(self.dataset(dataset_name), model)
        return LabelledImages(images=arrays["x"], labels=table[arrays["y"]])

    def _settled(self, run: run_pb2.Run) -> run_pb2.Run:
        if self.store.exists(key := keys.settled_config(run.name)):
            run.config.CopyFrom(self.store.read_message(key, run_pb2.RunConfig))
        return run

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
    """Raise InvalidInput unless a data set fits a model."""
    label_map(dataset, model)
    if list(model.image_shape) != list(dataset.image_shape):
        raise InvalidInput(
            f"model {names.last(model.name)!r} takes images of {format_shape(model.image_shape)}, the data set has "
            f"{format_shape(dataset.image_shape)}; bring images of the model's size",
            reason="IMAGE_SHAPE_MISMATCH",
        )


def format_shape(sizes: Iterable[int]) -> str:
    """Return sizes in the usual notation, such as 28x28x1."""
    return "x".join(str(size) for size in sizes)


def label_map(dataset: dataset_pb2.Dataset, model: model_pb2.Model) -> npt.NDArray[np.int64]:
    """Return the model's class id for each label of a data set.

    Class names are matched when the data set has any. Folders named by number and plain ids are class ids. Raises
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


def estimate(successes: int, trials: int) -> tensor_pb2.Estimate:
    """Return a share with its interval, as it is stored and sent."""
    from services.statistics.hypothesis_tests import clopper_pearson  # the gateway has no scipy

    low, high = clopper_pearson(successes, trials)
    value = successes / trials if trials else 0.0
    return tensor_pb2.Estimate(value=value, low=low, high=high, successes=successes, trials=trials)


Search, Validity = run_pb2.SearchConfig, run_pb2.ValidityConfig
# Measurements behind each default: docs/explanation/method.md, "Validity". Of a photograph, the latents hold too little
# for typicality, neighbours and round trip to tell valid images from others.
_ANY = 1e6
_BY_RENDERING = {
    Search.RENDERING_DECODER: Validity(min_typicality=0.01, min_neighbour_agreement=0.8, max_round_trip_sd=1.0),
    Search.RENDERING_RESIDUAL: Validity(min_typicality=0.0, min_neighbour_agreement=0.0, max_round_trip_sd=_ANY),
}
_BY_LABEL_MODEL = {
    Validity.LABEL_MODEL_LATENT: Validity(min_label_probability=0.998),
    Validity.LABEL_MODEL_IMAGE: Validity(min_label_probability=0.97),
}


def is_open(config: run_pb2.RunConfig) -> bool:
    """Return whether the rendering is left to the pilot."""
    return bool(config.search.rendering == Search.RENDERING_AUTO)


def is_residual(config: run_pb2.RunConfig) -> bool:
    """Return whether a run's images are changes of their sources."""
    return bool(config.search.rendering == Search.RENDERING_RESIDUAL)


def reads_images(config: run_pb2.RunConfig) -> bool:
    """Return whether the label model of a run reads images rather than latents."""
    return bool(config.validity.label_model == Validity.LABEL_MODEL_IMAGE)


def settle(config: run_pb2.RunConfig, rendering: run_pb2.SearchConfig.Rendering.ValueType) -> run_pb2.RunConfig:
    """Return a configuration with a rendering, its label model, and the thresholds that depend on them."""
    settled = run_pb2.RunConfig()
    settled.CopyFrom(config)
    settled.search.rendering = rendering
    if settled.validity.label_model in {Validity.LABEL_MODEL_UNSPECIFIED, Validity.LABEL_MODEL_AUTO}:
        residual = rendering == Search.RENDERING_RESIDUAL
        settled.validity.label_model = Validity.LABEL_MODEL_IMAGE if residual else Validity.LABEL_MODEL_LATENT
    thresholds = Validity()
    for defaults in (_BY_RENDERING[rendering], _BY_LABEL_MODEL[settled.validity.label_model], settled.validity):
        thresholds.MergeFrom(defaults)
    settled.validity.CopyFrom(thresholds)
    return settled
