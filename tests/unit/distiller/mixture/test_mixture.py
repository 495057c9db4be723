import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score

from services.distiller.mixture import DirichletProcessMixture
from tests.unit.distiller.mixture.clouds import planted, responsibilities

Array = npt.NDArray[Any]


@contextmanager
def silence() -> Iterator[None]:
    """Let a fit stop before it has converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_clouds_are_found_one_to_one(kind: Any, seed: int) -> None:
    """Twelve clouds that lie apart are twelve components of a hundred that there is room for."""
    x, label = planted(clouds=12, dim=5, points=3000, apart=8.0, seed=seed)
    model = DirichletProcessMixture(n_components=100, covariance_type=kind, random_state=seed).fit(x)
    assert adjusted_rand_score(label, model.predict(x)) > 0.98
    if kind == "full":  # the clouds are no axis-parallel ellipsoids
        assert (model.counts_ > 1).sum() == 12
        for component in np.flatnonzero(model.counts_ > 1):
            inside = x[model.predict(x) == component]
            np.testing.assert_allclose(model.means_[component], inside.mean(axis=0), atol=0.2)
            np.testing.assert_allclose(model.weights_[component], len(inside) / len(x), atol=0.01)


@pytest.mark.parametrize("start", ["kmeans", "k-means++"])
def test_moves_find_a_higher_bound(start: Any) -> None:
    """From the same start, merges and splits end higher than coordinate ascent alone, and nearer to the truth."""
    x, label = planted(clouds=15, dim=4, points=4000, apart=3.0)
    settings: dict[str, Any] = {"n_components": 60, "init_params": start, "tol": 1e-2, "max_iter": 300}
    moved = DirichletProcessMixture(**settings).fit(x)
    with silence():
        ascent = DirichletProcessMixture(**settings, moves=False).fit(x)
    assert moved.lower_bound_ > ascent.lower_bound_
    assert adjusted_rand_score(label, moved.predict(x)) > adjusted_rand_score(label, ascent.predict(x))


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_splits_part_what_began_as_one(kind: Any, blocks: int) -> None:
    """From a single component that has all points, splits alone find every cloud, however many blocks remember it."""
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(6), 200)
    x = 8.0 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [2, 1, 0], [0, 1, 1], [1, 2, 2]])[label]
    x += random.standard_normal(x.shape)
    one = np.zeros((len(x), 12))
    one[:, 0] = 1.0
    model = DirichletProcessMixture(n_components=12, covariance_type=kind, blocks=blocks)
    assert adjusted_rand_score(label, model.fit(x, responsibilities=one).predict(x)) > 0.99


def test_every_pass_raises_the_bound() -> None:
    """Blocks, of which each is asked in turn, raise the bound as a whole pass does, and reach it in fewer passes."""
    x, _ = planted(clouds=8, dim=4, points=4000, apart=2.0)
    begin = responsibilities(len(x), 20)
    bounds = {}
    for blocks in (1, 8):
        model = DirichletProcessMixture(n_components=20, blocks=blocks, moves=False, max_iter=40, tol=0)
        with pytest.warns(ConvergenceWarning):
            bounds[blocks] = np.array(model.fit(x, responsibilities=begin).lower_bounds_)
        assert (np.diff(bounds[blocks]) > -1e-6 * np.abs(bounds[blocks][1:])).all()
    assert (bounds[8] > bounds[1][10]).argmax() < 10


def test_categories_part_what_lies_at_one_place() -> None:
    """Two groups of points at the same place with other class ids are two components, each of one id."""
    x, _ = planted(clouds=2, dim=3, points=900, apart=9.0)
    true, predicted = np.arange(900) % 2, np.arange(900) % 2 + 1
    alone = DirichletProcessMixture(n_components=30).fit(x)
    aware = DirichletProcessMixture(n_components=30).fit(x, categories=[true, predicted])
    assert ((alone.counts_ > 1).sum(), (aware.counts_ > 1).sum()) == (2, 4)
    labels = aware.predict(x, categories=[true, predicted])
    assert adjusted_rand_score(true, labels) > 0.3
    for component in np.flatnonzero(aware.counts_ > 1):
        assert len(np.unique(true[labels == component])) == 1
        assert aware.categories_[0][:, component].max() > 0.99
        assert aware.categories_[1][:, component].argmax() == aware.categories_[0][:, component].argmax() + 1
    # Without its class ids a point is read by its place alone, so they are asked for.
    with pytest.raises(ValueError, match="0 categories are given: give 2"):
        aware.predict(x)


def test_screened_components_change_nothing() -> None:
    """In many dimensions far components are left out, and every number stays as if they had been asked."""
    x, label = planted(clouds=6, dim=40, points=1500, apart=4.0)
    categories = [label % 3]
    begin = responsibilities(len(x), 10)
    fits = []
    for dim_from in (32, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("services.distiller.mixture.e_step.LEAST_DIM", dim_from)
            model = DirichletProcessMixture(n_components=10, moves=False, blocks=1, max_iter=8, tol=0)
            with pytest.warns(ConvergenceWarning):
                fits.append(model.fit(x, categories=categories, responsibilities=begin))
    assert fits[0].lower_bound_ == pytest.approx(fits[1].lower_bound_, rel=1e-9)
    np.testing.assert_allclose(fits[0].means_, fits[1].means_, atol=1e-7)
    np.testing.assert_allclose(fits[0].categories_[0], fits[1].categories_[0], atol=1e-9)


def test_a_memory_map_is_fitted_like_an_array(tmp_path: Any) -> None:
    """Points on disk, in float32, are read a chunk at a time."""
    x, _ = planted(clouds=4, dim=3, points=2000, apart=6.0)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    settings: dict[str, Any] = {"n_components": 20, "chunk_size": 100}
    on_disk = DirichletProcessMixture(**settings).fit(mapped)
    in_memory = DirichletProcessMixture(**settings).fit(x.astype(np.float32))
    np.testing.assert_array_equal(on_disk.means_, in_memory.means_)
    np.testing.assert_array_equal(on_disk.predict(mapped), in_memory.predict(x.astype(np.float32)))


def test_draws_follow_the_mixture() -> None:
    """Draws have the weights, means and covariances of the fit."""
    x, _ = planted(clouds=3, dim=2, points=3000, apart=9.0)
    model = DirichletProcessMixture(n_components=10).fit(x)
    drawn, label = model.sample(20_000, random_state=3)
    for component in np.flatnonzero(model.counts_ > 1):
        inside = drawn[label == component]
        assert len(inside) / len(drawn) == pytest.approx(model.weights_[component], abs=0.015)
        np.testing.assert_allclose(inside.mean(axis=0), model.means_[component], atol=0.08)
        np.testing.assert_allclose(np.cov(inside.T), model.covariances_[component], atol=0.15)


def test_the_best_of_several_starts_is_kept() -> None:
    """More starts never end lower."""
    x, _ = planted(clouds=10, dim=3, points=1500, apart=2.0)
    settings: dict[str, Any] = {"n_components": 30, "init_params": "random_from_data", "moves": False, "max_iter": 30}
    with silence():
        single = DirichletProcessMixture(**settings).fit(x)
        several = DirichletProcessMixture(**settings, n_init=4).fit(x)
    assert several.lower_bound_ > single.lower_bound_


def test_threads_change_nothing_but_rounding() -> None:
    """With clouds that overlap, where every draw of a move matters, one thread and several end at the same bound."""
    x, _ = planted(clouds=12, dim=3, points=3000, apart=1.5, seed=6)
    bounds = [
        DirichletProcessMixture(n_components=40, random_state=6, threads=threads, chunk_size=500).fit(x).lower_bound_
        for threads in (1, 2, 4)
    ]
    np.testing.assert_allclose(bounds, bounds[0], rtol=1e-9)


def test_classes_that_the_fit_did_not_see() -> None:
    """With sizes given, a class id beyond those seen is told a component; without, it is refused."""
    x, label = planted(clouds=3, dim=2, points=300, apart=8.0)
    known = DirichletProcessMixture(n_components=6).fit(x, categories=[label], category_sizes=[5])
    assert known.predict(x[:1], categories=[np.array([4])]).shape == (1,)
    with pytest.raises(ValueError, match="class id 4 was not known to the fit, which has 3: give category_sizes"):
        DirichletProcessMixture(n_components=6).fit(x, categories=[label]).predict(x[:1], categories=[np.array([4])])
    with pytest.raises(ValueError, match=r"category_sizes are \[2\], but class ids go up to \[2\]"):
        known.fit(x, categories=[label], category_sizes=[2])


def test_no_split_without_an_empty_component() -> None:
    """A truncation that is used up ends the moves: no pass over the data is spent on splits that cannot be."""
    x, _ = planted(clouds=8, dim=2, points=800, apart=6.0)
    assert DirichletProcessMixture(n_components=3, blocks=1).fit(x).n_iter_ < 40


def test_same_seed_same_mixture() -> None:
    """A fit is its data and its seed."""
    x, _ = planted(clouds=5, dim=3, points=800, apart=3.0)
    first, second = (DirichletProcessMixture(n_components=20, random_state=7).fit(x) for _ in range(2))
    np.testing.assert_array_equal(first.means_, second.means_)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_few_points_are_fitted(points: int) -> None:
    """Fewer points than components or dimensions are no error."""
    x, _ = planted(clouds=2, dim=3, points=points, apart=5.0)
    model = DirichletProcessMixture(n_components=10).fit(x)
    assert np.isfinite(model.means_).all()
    assert model.counts_.sum() == pytest.approx(points)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"X": np.zeros(3)}, r"X has shape \(3,\): give points \(n, d\)"),
        ({}, {"X": np.zeros((0, 2))}, r"X has shape \(0, 2\)"),
        ({}, {"X": np.array([[np.nan, 1.0], [0.0, 1.0]])}, "not finite"),
        ({"n_components": 0}, {"X": np.zeros((3, 2))}, "n_components is 0: give 1 or more"),
        ({"covariance_type": "round"}, {"X": np.zeros((3, 2))}, "covariance_type is 'round': give one of full, tied"),
        (
            {"degrees_of_freedom_prior": 0.5},
            {"X": np.zeros((3, 2))},
            "degrees_of_freedom_prior is 0.5: give more than 1",
        ),
        ({}, {"X": np.zeros((3, 2)), "categories": [np.zeros(2, int)]}, "2 values of a category for 3 points"),
        ({}, {"X": np.zeros((3, 2)), "categories": [np.array([0, -1, 0])]}, "give class ids from 0"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    """Invalid arguments are named, with valid ones."""
    with pytest.raises(ValueError, match=message):
        DirichletProcessMixture(**settings).fit(arguments.pop("X"), **arguments)


def test_points_are_not_read_before_a_fit() -> None:
    """A mixture that is not fitted says so; one that is wants points of its dimensions."""
    with pytest.raises(NotFittedError):
        DirichletProcessMixture().predict(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"give points \(n, 3\)"):
        DirichletProcessMixture(n_components=2).fit(np.eye(3)).predict(np.zeros((2, 2)))
