"""The images of a run: its encoder, its rendering, its label model, and fresh images of regions.

Distiller and corrector read them from the store.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from defuse.v1 import run_pb2

from services.arrays import Array
from services.latent_space.rendering import NO_SOURCE, Perturbations, Renderer, SourceImages
from services.onnx_graph.onnx_files import in_batches, onnx_function
from services.statistics.gaussian import Gaussian
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, is_residual, reads_images

_BATCH = 256
# Draws for each fresh image, of which the first that carries its label is taken.
MOST_DRAWS = 20
# A source is near a region when it lies as near to the mean as this share of the region's own sources.
_NEAR = 0.95


@dataclass(frozen=True, kw_only=True)
class RegionShape:
    """The distribution and the sources from which fresh images of a region are drawn."""

    gaussian: Gaussian
    # (m,) sources of its failures
    sources: Array

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> "RegionShape":
        """Return the shape of a region's stored arrays."""
        gaussian = Gaussian(mean=arrays["mean"], covariance=arrays["covariance"])
        return cls(gaussian=gaussian, sources=arrays["source"])


@dataclass(frozen=True, kw_only=True)
class SearchedSources:
    """The searched images of a run, with the served classifier's answers."""

    images: SourceImages
    # Over `images.row`, (s,): class ids, whether read correctly, whether held out of correction.
    label: Array
    right: Array
    held_out: Array

    def label_of(self, source: Array) -> Array:
        """Return the class ids (n,) of sources (n,)."""
        return np.asarray(self.label[np.searchsorted(self.images.row, source)])


SourceFilter = Callable[[SearchedSources], Array]
"""Searched sources (s,) -> which of them may be taken, (s,) bool."""


class RunImages:
    """Renders and judges the perturbations of a prepared run."""

    def __init__(self, store: ArtifactStore, run: run_pb2.Run) -> None:
        self._store, self._run = store, run

    @property
    def is_residual(self) -> bool:
        """Return whether images are changes of their sources."""
        return is_residual(self._run.config)

    @cached_property
    def encode(self) -> Callable[[Array], Array]:
        """Return the encoder: images (n, c, h, w) in [0, 1] to posterior means (n, d)."""
        return _first_output(self._store.read_bytes(keys.vae(self._run.config, "encoder.onnx")))

    @cached_property
    def decode(self) -> Callable[[Array], Array]:
        """Return the decoder: latents (n, d) to images (n, c, h, w) in [0, 1].

        Values of a user's decoder outside [0, 1] are clipped, as in the search.
        """
        decode = _first_output(self._store.read_bytes(keys.vae(self._run.config, "decoder.onnx")))
        return lambda z: np.clip(decode(z), 0, 1)

    @cached_property
    def sources(self) -> SearchedSources:
        """Return the searched images with their latents, as the search measured them."""
        run, catalog = self._run, Catalog(self._store)
        prepared = self._store.read_arrays(keys.sources(run.name))
        shards = -(-len(prepared["index"]) // run.config.search.shard_size)
        parts = [self._store.read_arrays(keys.shard_sources(run.name, shard)) for shard in range(shards)]
        split = catalog.split(run.config.dataset, keys.SEARCHED_SPLIT, catalog.model(run.config.model))
        mu, margin = (np.concatenate([part[name] for part in parts]) for name in ("mu", "image_margin"))
        return SearchedSources(
            images=SourceImages(row=prepared["index"], mu=mu, images=split.images),
            label=split.labels[prepared["index"]],
            right=margin > 0,
            held_out=prepared["held_out"] == 1,
        )

    def render(self, perturbations: Perturbations) -> Array:
        """Return the images (n, c, h, w) in [0, 1] of n > 0 perturbations."""
        renderer = self._renderer
        parts = [slice(begin, begin + _BATCH) for begin in range(0, len(perturbations), _BATCH)]
        return np.concatenate([renderer(perturbations.latent[part], perturbations.source[part]) for part in parts])

    def carry(self, perturbations: Perturbations, label: Array) -> Array:
        """Return whether perturbations carry labels (n,), (n,) bool, as the run's validity requires."""
        if not len(perturbations):
            return np.zeros(0, bool)
        given = self.render(perturbations) if reads_images(self._run.config) else perturbations.latent
        probability = self._label_model(given)[np.arange(len(perturbations)), label]
        return np.asarray(probability >= self._run.config.validity.min_label_probability)

    def fresh(
        self,
        region: RegionShape,
        label_of: Callable[[Perturbations], Array],
        count: int,
        generator: np.random.Generator,
        *,
        spread: float = 1.0,
        of_source: SourceFilter = lambda sources: sources.right,
        one_of_each: bool = False,
    ) -> Perturbations:
        """Draw at most `count` fresh perturbations of a region that carry their labels.

        `label_of` returns the labels (n,) that perturbations must carry. `decoder` draws from the region's Gaussian,
        whose covariance `spread` scales. `residual` moves real images near the region towards such draws, by at most
        the run's largest radius: images of a label of its sources that the classifier reads correctly, the nearest
        first (Mahalanobis distance). `of_source` restricts them to some of `sources`, and `one_of_each` takes each
        once. An image without a draw that carries its label, of MOST_DRAWS, is left out.
        """
        gaussian = Gaussian(mean=region.gaussian.mean, covariance=spread * region.gaussian.covariance)
        source = self._source_of_each(region, count, of_source, one_of_each=one_of_each)
        found = [Perturbations.none(len(gaussian.mean))]
        for _ in range(MOST_DRAWS):
            if not len(source):
                break
            drawn = self._towards(gaussian.sample(len(source), generator), source)
            carried = self.carry(drawn, label_of(drawn))
            found.append(drawn.take(carried))
            source = source[~carried]
        return Perturbations.joined(found)

    def unchecked(self, region: RegionShape, count: int, generator: np.random.Generator) -> Perturbations:
        """Draw at most `count` fresh perturbations of a region, whether or not they carry its label."""
        source = self._source_of_each(region, count, lambda sources: sources.right, one_of_each=False)
        return self._towards(region.gaussian.sample(len(source), generator), source)

    def _source_of_each(self, region: RegionShape, count: int, of_source: SourceFilter, *, one_of_each: bool) -> Array:
        """Return the source of each image to draw, (n,)."""
        if not self.is_residual:
            return np.full(count, NO_SOURCE)
        near = self._near(region, of_source)
        return near[:count] if one_of_each else np.resize(near, count if len(near) else 0)

    def _near(self, region: RegionShape, of_source: SourceFilter) -> Array:
        """Return the sources near a region, the nearest first."""
        known = self.sources
        own = np.searchsorted(known.images.row, np.unique(region.sources))
        distance = region.gaussian.distance_squared(known.images.mu)
        near = distance <= np.quantile(distance[own], _NEAR)
        rows = np.flatnonzero(near & known.right & np.isin(known.label, known.label[own]) & of_source(known))
        return np.asarray(known.images.row[rows[np.argsort(distance[rows], kind="stable")]])

    def _towards(self, latent: Array, source: Array) -> Perturbations:
        """Return draws (n, d), no farther from their sources than the run's largest radius."""
        if self.is_residual:
            mu, sd_agg = self.sources.images.mu_of(source), self._sd_agg
            step = (latent - mu) / sd_agg
            radius = np.sqrt((step**2).mean(axis=1, keepdims=True))
            most = self._run.config.validity.max_radius_sd
            latent = mu + sd_agg * step * (most / np.maximum(radius, most))
        return Perturbations(latent=latent.astype(np.float32), source=source)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(decode=self.decode, sources=self.sources.images if self.is_residual else None)

    @cached_property
    def _label_model(self) -> Callable[[Array], Array]:
        """Return the label model: latents (n, d) or images (n, c, h, w) to probabilities (n, k)."""
        return _first_output(self._store.read_bytes(keys.label_model_onnx(self._run.config)))

    @cached_property
    def _sd_agg(self) -> Array:
        return np.asarray(self._store.read_arrays(keys.sources(self._run.name))["sd_agg"])


def _first_output(file: bytes) -> Callable[[Array], Array]:
    function = onnx_function(file)
    return lambda inputs: in_batches(lambda part: function(part)[0], inputs.astype(np.float32), _BATCH)
