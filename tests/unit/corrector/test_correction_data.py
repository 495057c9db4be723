from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from defuse.v1 import run_pb2

from services.corrector.correction_data import RegionData, fresh_images, sample_region, sample_regions
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RegionShape, RunImages, SearchedSources
from services.statistics.gaussian import Gaussian
from services.storage.artifacts import ArtifactStore

Array = npt.NDArray[Any]
Judging = Callable[[Callable[[Array, Array], Array]], RunImages]


@pytest.fixture
def judging(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Judging:
    """Make the images of a run whose label model is a rule on latents (n, d) and labels (n,)."""

    def images(rule: Callable[[Array, Array], Array]) -> RunImages:
        made = RunImages(store, run_pb2.Run(config={"search": {"rendering": "RENDERING_DECODER"}}))
        monkeypatch.setattr(made, "carry", lambda drawn, label: rule(drawn.latent, label))
        return made

    return images


def planted(count: int = 30, centre: float = 0.0, label: int = 1, seed: int = 0) -> RegionData:
    """Plant failures around a centre, narrow in the first dimension and wide in the second."""
    spread = np.random.default_rng(seed).standard_normal((count, 3)) * [1, 10, 1]
    failures = Perturbations(latent=np.asarray(spread + centre, np.float32), source=np.arange(count))
    gaussian = Gaussian(mean=np.full(3, centre), covariance=np.diag([1.0, 100.0, 1.0]))
    return RegionData(failures=failures, shape=RegionShape(gaussian=gaussian, sources=np.arange(count)), label=label)


def usable(sources: SearchedSources) -> Array:
    return ~sources.held_out


def everything(latent: Array, _: Array) -> Array:
    return np.ones(len(latent), bool)


def nothing(latent: Array, _: Array) -> Array:
    return np.zeros(len(latent), bool)


def of_sign(latent: Array, label: Array) -> Array:
    """Believe that latents of a positive first dimension are of class 1, others of class 0."""
    return np.asarray((latent[:, 0] > 0) == label)


def test_images_are_fresh_draws_from_the_gaussian(judging: Judging) -> None:
    """Draws have the region's mean and covariance, and are no known failure."""
    region = planted(centre=5)
    drawn = sample_region(judging(everything), region, 20_000, np.random.default_rng(1)).latent
    np.testing.assert_allclose(drawn.mean(axis=0), 5, atol=0.3)
    np.testing.assert_allclose(np.cov(drawn.T), np.diag([1, 100, 1]), atol=3)
    assert not {tuple(row) for row in drawn} & {tuple(row) for row in region.failures.latent}


def test_draws_still_carry_the_label(judging: Judging) -> None:
    """Latents that do not carry the label are drawn again."""
    drawn = sample_region(judging(of_sign), planted(), 1000, np.random.default_rng(0))
    assert len(drawn) == 1000
    # A slot without any draw that carries the label, of twenty, is filled with a failure.
    assert (drawn.latent[:, 0] > 0).mean() > 0.999


def test_draws_of_a_wider_gaussian(judging: Judging) -> None:
    """Four times the covariance is twice as wide; draws without the label are left out, not replaced."""
    region = planted()
    narrow, wide = (
        fresh_images(judging(everything), region, 5000, np.random.default_rng(0), spread=s, of_source=usable).latent
        for s in (1.0, 4.0)
    )
    np.testing.assert_allclose(wide.std(axis=0), 2 * narrow.std(axis=0), rtol=1e-3)
    assert len(fresh_images(judging(nothing), region, 50, np.random.default_rng(0), of_source=usable)) == 0


def test_where_hardly_any_draw_carries_the_label_failures_fill_up(judging: Judging) -> None:
    """A region is never short of images, and never filled with what is not its label: its failures come in turn."""
    region = planted()
    drawn = sample_region(judging(nothing), region, 60, np.random.default_rng(0))
    found, counts = np.unique(drawn.latent, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, np.unique(region.failures.latent, axis=0))
    np.testing.assert_array_equal(region.failures.latent[drawn.source], drawn.latent)
    assert set(counts) == {2}
    few = sample_region(judging(nothing), region, 10, np.random.default_rng(0))
    assert len(np.unique(few.latent, axis=0)) == 10


def test_a_single_failure_is_repeated(judging: Judging) -> None:
    """Nothing is made up around a failure that was labelled by itself."""
    failure = Perturbations(latent=np.array([[1, 2, 3]], np.float32), source=np.array([7]))
    drawn = sample_region(
        judging(everything), RegionData(failures=failure, shape=None, label=0), 5, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(drawn.latent, [[1, 2, 3]] * 5)
    assert drawn.source.tolist() == [7] * 5


def test_regions_count_the_same_whatever_their_size(judging: Judging) -> None:
    """Each region gives as many images, with the annotator's label, and they carry it."""
    regions = [planted(5, -3, label=0), planted(80, 3, label=1)]
    drawn, labels = sample_regions(judging(of_sign), regions, per_region=200, seed=0)
    np.testing.assert_array_equal(labels, [0] * 200 + [1] * 200)
    assert drawn.latent.shape == (400, 3)
    assert (drawn.latent[:200, 0] <= 0).all()
    assert (drawn.latent[200:, 0] > 0).all()


def test_same_seed_same_images(judging: Judging) -> None:
    """They are the regions and the seed."""
    first, second, other = (
        sample_regions(judging(of_sign), [planted()], per_region=64, seed=seed)[0].latent for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
