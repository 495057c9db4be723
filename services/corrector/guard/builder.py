"""Guards for the labelled regions of a run.

A guard is built, calibrated on real images, measured and served.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.errors import DefuseError, InvalidInput, NotReady
from defuse.guard_outputs import OUTPUTS, RISK
from defuse.v1 import (
    annotation_pb2,
    correction_pb2,
    corrector_service_pb2,
    guard_pb2,
    model_pb2,
    release_pb2,
    run_pb2,
    tensor_pb2,
)

from services.arrays import Array, as_floats, as_stored
from services.corrector.correction_data import RegionData, held_out_failures, sample_region
from services.corrector.evaluation import LocalVersion
from services.corrector.external_triton import AnyReleases
from services.corrector.guard.graph import GaussianMixtures, GuardMixtures, guard_graph
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.onnx_graph.onnx_files import in_batches, onnx_function
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages, estimate
from services.triton.preprocessing import preprocess

FALSE_ALARM_RATE = 0.05
# Images to whose latents a region's Gaussian is fitted.
_DRAWS = 1_000
# Real images for calibration and measurement: enough for a rate of one in a thousand.
_MOST_IMAGES = 10_000
# Entries of the typicality table.
_TABLE = 1_000
# Separates the draws of guards from others of the same seed.
_STREAM = 0x47554152
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class BuiltGuard:
    """A guard's record, without name and time, and its ONNX file."""

    record: guard_pb2.Guard
    file: bytes


class GuardBuilder:
    """Builds guards from the artifacts of a run."""

    def __init__(self, store: ArtifactStore, run: run_pb2.Run) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._run = run
        self._images = RunImages(store, run)
        self.model: model_pb2.Model = self._catalog.model(run.config.model)

    def build(self, false_alarm_rate: float = FALSE_ALARM_RATE) -> BuiltGuard:
        """Build the guard of the regions that have a label now.

        Raises NotReady when there are none, or too few images for calibration, and InvalidInput for a rate outside (0,
        1).
        """
        if not 0 < false_alarm_rate < 1:
            raise InvalidInput(
                f"the false alarm rate is {false_alarm_rate}; give a share between 0 and 1", reason="OUT_OF_BOUNDS"
            )
        regions = self._labelled()
        known = self._knowledge(regions)
        encoder = self._store.read_bytes(keys.vae(self._run.config, "encoder.onnx"))
        risk = self._risk(guard_graph(encoder, self.model, known, threshold=0.0))
        clean = self._clean_held_out()
        threshold = conformal_threshold(risk(as_floats(clean)), false_alarm_rate)
        record = guard_pb2.Guard(
            run=self._run.name,
            regions=regions,
            false_alarm_rate=false_alarm_rate,
            threshold=threshold,
            calibration_images=len(clean),
        )
        self._measure(record, lambda images: risk(images) >= threshold)
        return BuiltGuard(record=record, file=guard_graph(encoder, self.model, known, threshold=threshold))

    def _labelled(self) -> list[correction_pb2.LabelledRegion]:
        labelled = [
            correction_pb2.LabelledRegion(region=region.name, label=region.annotation.label)
            for region in self._catalog.regions(self._run.name)
            if region.annotation.verdict == annotation_pb2.Annotation.VERDICT_LABEL
        ]
        if not labelled:
            raise NotReady(
                f"no region of run {names.last(self._run.name)!r} has a label; annotate at least one with "
                "`defuse annotate`",
                reason="NO_ANNOTATIONS",
            )
        return labelled

    def _knowledge(self, regions: Sequence[correction_pb2.LabelledRegion]) -> GuardMixtures:
        reference = self._store.read_arrays(keys.reference(self._run.config))
        classes = np.unique(reference["label"])
        order = np.linspace(0, len(reference["log_density"]) - 1, min(_TABLE, len(reference["log_density"])))
        arrays = [self._store.read_arrays(keys.region_arrays(region.region)) for region in regions]
        return GuardMixtures(
            names=[region.region for region in regions],
            regions=GaussianMixtures.of(
                [self._encoded(*each) / reference["sd_agg"] for each in zip(regions, arrays, strict=True)],
                [len(array["latent"]) for array in arrays],
            ),
            real=GaussianMixtures.of(
                [reference["latent"][reference["label"] == one] for one in classes],
                [float((reference["label"] == one).mean()) for one in classes],
            ),
            aggregate=GaussianMixtures(
                log_weight=reference["log_share"], mean=reference["mean"], whitening=reference["whitening"]
            ),
            log_density=reference["log_density"][order.round().astype(int)],
            scale=reference["sd_agg"],
        )

    def _encoded(self, region: correction_pb2.LabelledRegion, arrays: dict[str, Array]) -> Array:
        """Return the posterior means (n, d) of a region's images.

        They differ from the latents behind the images, because rendering and encoding moves them closer together.
        """
        data = RegionData.of(arrays, self._class_id(region.label))
        generator = np.random.default_rng([self._run.config.seed, _STREAM])
        return self._images.encode(self._pictures(sample_region(self._images, data, _DRAWS, generator)))

    def _pictures(self, perturbations: Perturbations) -> Array:
        """Return the images (n, c, h, w) of n > 0 perturbations, rounded to eight bits."""
        return as_floats(as_stored(self._images.render(perturbations)))

    def _clean_held_out(self) -> Array:
        """Return correctly classified images that no region was fitted to.

        They are searched images (n, h, w, c).
        """
        sources = self._store.read_arrays(keys.sources(self._run.name))
        held_out = self._few(sources["index"][sources["held_out"] == 1])
        split = self._split(keys.SEARCHED_SPLIT)
        images = LabelledImages(images=split.images[held_out], labels=split.labels[held_out])
        return np.asarray(images.images[self._searched_version().reads_stored_correctly(images)])

    def _measure(self, record: guard_pb2.Guard, inside: Callable[[Array], Array]) -> None:
        """Write a guard's measured rates into its record.

        `inside` tests images (n, c, h, w) in [0, 1] and returns (n,) bool.
        """
        split = self._split("test")
        rows = self._few(np.arange(len(split.labels)))
        test = LabelledImages(images=split.images[rows], labels=split.labels[rows])
        right = self._searched_version().reads_stored_correctly(test)
        found = inside(as_floats(test.images))
        record.measured_false_alarm_rate.CopyFrom(_share(found[right]))
        record.misread_recall.CopyFrom(_share(found[~right]))
        held_out = Perturbations.joined(
            [held_out_failures(self._store.read_arrays(keys.region_arrays(one.region))) for one in record.regions]
        )
        found = inside(self._pictures(held_out)) if len(held_out) else np.zeros(0, bool)
        record.recall.CopyFrom(_share(found))

    def _risk(self, file: bytes) -> Callable[[Array], Array]:
        """Return a function that computes a guard's risks (n,).

        It takes images (n, c, h, w) in [0, 1].
        """
        run, position = onnx_function(file), OUTPUTS.index(RISK)
        fixed = self.model.fixed_batch_size

        def answers(images: Array) -> Array:
            rows = np.resize(np.arange(len(images)), fixed or len(images))
            return np.asarray(run(preprocess(images[rows], self.model))[position][: len(images), 0])

        return lambda images: in_batches(answers, images, fixed or _BATCH)

    def _searched_version(self) -> LocalVersion:
        version = self._run.config.model_version
        return LocalVersion(self._store.read_bytes(keys.model_file(self.model.name, version)), self.model)

    def _few(self, rows: Array) -> Array:
        """Return a fixed sample of rows, ascending."""
        generator = np.random.default_rng([self._run.config.seed, _STREAM])
        return np.sort(generator.choice(rows, size=min(_MOST_IMAGES, len(rows)), replace=False))

    def _split(self, name: str) -> LabelledImages:
        return self._catalog.split(self._run.config.dataset, name, self.model)

    def _class_id(self, label: str) -> int:
        return list(self.model.classes).index(label)


def conformal_threshold(risk: Array, false_alarm_rate: float) -> float:
    """Return a threshold that new images exceed with a bounded probability.

    It is the ceil((1 - rate) (n + 1))-th smallest of the given risks (n,), by split conformal prediction (Vovk,
    Gammerman and Shafer, 2005). The bound holds for new images that are distributed like the given ones. The threshold
    is rounded up to the next float, since the threshold itself counts as inside. Raises NotReady for too few images.
    """
    rank = math.ceil((1 - false_alarm_rate) * (len(risk) + 1))
    if rank > len(risk):
        needed = math.ceil(1 / false_alarm_rate) - 1
        raise NotReady(
            f"a false alarm rate of {false_alarm_rate:g} needs {needed} held-out images that are read correctly to be "
            f"calibrated on, there are {len(risk)}; bring more images, or allow {1 / (len(risk) + 1):.2g}",
            reason="TOO_FEW_IMAGES",
        )
    return float(np.nextafter(np.float32(np.sort(risk)[rank - 1]), np.float32(np.inf)))


def _share(found: Array) -> tensor_pb2.Estimate:
    return estimate(int(found.sum()), len(found))


class GuardIssuer:
    """Builds guards and makes Triton serve them."""

    def __init__(self, store: ArtifactStore, releases: AnyReleases) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._releases = releases

    def requested(self, request: corrector_service_pb2.IssueGuardRequest) -> guard_pb2.Guard:
        """Return the guard of a request, which the first call builds."""
        model = self._catalog.run(request.run).config.model
        for guard in self._catalog.guards(model) if request.request_id else ():
            if guard.request_id == request.request_id:
                return guard
        return self.issue(request.run, request.false_alarm_rate, request_id=request.request_id)

    def issue(self, run_name: str, false_alarm_rate: float = 0.0, *, request_id: str = "") -> guard_pb2.Guard:
        """Build a guard for a run's labelled regions and serve it.

        A rate of 0 takes the default. Raises NotFound for an unknown run, and otherwise as `GuardBuilder.build` does.
        """
        builder = GuardBuilder(self._store, self._catalog.run(run_name))
        built, model = builder.build(false_alarm_rate or FALSE_ALARM_RATE), builder.model
        model_id = names.last(model.name)
        record = built.record
        record.name = names.guard(model_id, str(self._releases.serve_guard(model, built.file)))
        record.guard_model, record.guarded_model = names.guard_model(model_id), names.guarded_model(model_id)
        record.model_version, record.request_id = model.champion_version, request_id
        record.create_time.GetCurrentTime()
        self._store.write_bytes(keys.onnx_file(record.name), built.file)
        self._store.write_message(keys.guard(record.name), record)
        return record

    def renew(self, run_name: str, release: release_pb2.Release) -> None:
        """Build the guard of a release, once.

        A failure is logged and does not fail the release.
        """
        guards, since = self._catalog.guards(release.model), release.create_time.ToNanoseconds()
        if any(guard.run == run_name and guard.create_time.ToNanoseconds() >= since for guard in guards):
            return
        try:
            self.issue(run_name)
        except DefuseError as error:
            telemetry.log().warning("no_guard", run=run_name, reason=error.reason, error=error.message)
