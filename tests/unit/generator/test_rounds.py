"""A search in rounds, its stages played in turn: the same failures for all, found again, and many of them."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from defuse.v1 import run_pb2, work_pb2

from services.generator import allocation
from services.generator.allocation import DirectionSums
from services.generator.perturbations import perturbations
from services.generator.pipeline import rounded
from services.generator.rounds import (
    RoundPlan,
    first_allocation,
    make_plan,
    planned_allocation,
    read_margins,
    read_result,
)
from services.generator.run_context import noise_model_of
from services.runtime.queue import IDENTIFY, PLAN
from services.storage import keys
from services.storage.keys import SEARCHED_SPLIT
from tests.unit.generator.run_fixture import BEE, SPLITS, Array, Workshop, joined, truth, weak

ADAPTIVE: dict[str, Any] = {"draws_per_source": 8, "rounds": 4, "max_failures_per_source": 3}
UNIFORM = ADAPTIVE | {"strategy": run_pb2.SearchConfig.STRATEGY_UNIFORM}
SEARCHES = {
    "adaptive": ADAPTIVE,
    "uniform": UNIFORM,
    "released": UNIFORM | {"noise": run_pb2.SearchConfig.NOISE_RELEASED},
}
# The released code's steps are long here; their latents, not the checks, are what is asked about.
LENIENT = {"max_radius_sd": 100.0, "min_label_probability": 0.0, "min_typicality": 0.0, "min_neighbour_agreement": 0.0}


@dataclass(frozen=True, kw_only=True)
class Played:
    """A run as it was created, as it is in the end, and what was stored of its failures."""

    run: run_pb2.Run
    end: run_pb2.Run
    found: dict[str, Array]


def played(workshop: Workshop, run_id: str, search: dict[str, Any], **how: Any) -> Played:
    run = workshop.prepared_run(run_id, search=search, validity=LENIENT if "noise" in search else {})
    end = workshop.play(run, **how)
    return Played(run=run, end=end, found=workshop.found(run))


@pytest.fixture(scope="module")
def alone(workshop: Workshop) -> dict[str, Played]:
    """Each kind of search in a single shard, done by a single worker."""
    return {kind: played(workshop, kind, search) for kind, search in SEARCHES.items()}


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize(
    ("shard_size", "batch_size", "workers", "backwards"),
    [(150, 512, 2, False), (150, 64, 1, True), (60, 7, 5, False), (60, 1000, 5, True), (299, 33, 3, False)],
)
def test_same_failures_whoever_does_the_work(
    workshop: Workshop,
    alone: dict[str, Played],
    kind: str,
    shard_size: int,
    batch_size: int,
    workers: int,
    backwards: bool,
) -> None:
    """Shards, batches, workers and the order of their work change neither a failure nor a count, nor any plan."""
    search = SEARCHES[kind] | {"shard_size": shard_size, "batch_size": batch_size}
    one = alone[kind]
    other = played(workshop, f"{kind}-{shard_size}-{batch_size}", search, workers=workers, backwards=backwards)
    assert other.end.shard_count == -(-SPLITS[SEARCHED_SPLIT] // shard_size)
    assert len(one.found["source"]) > 20
    for field, array in one.found.items():
        # What a network measures differs by rounding between batches; who a failure is does not.
        measured = field in {"label_probability", "margin", "oracle_margin"}
        np.testing.assert_allclose(other.found[field], array, rtol=1e-3 if measured else 0, err_msg=field)
    assert other.end.counts == one.end.counts
    assert other.end.round == one.end.round == (ADAPTIVE["rounds"] - 1 if kind == "adaptive" else 0)
    for round_ in range(1, one.end.round + 1):
        first, second = (workshop.store.read_arrays(keys.plan(run.name, round_)) for run in (one.run, other.run))
        np.testing.assert_array_equal(first["plan.decodes"], second["plan.decodes"])


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_failure_is_found_again_from_its_provenance(workshop: Workshop, alone: dict[str, Played], kind: str) -> None:
    """Source, round, draw and the configuration give each failure's latent bit for bit, and it is wrong again."""
    run, found = alone[kind].run, alone[kind].found
    stored = workshop.context.images(run, SEARCHED_SPLIT)
    pair, sd_agg = workshop.context.codec(run.config), workshop.context.prepared(run).sd_agg
    assert len(set(found["round"])) == (ADAPTIVE["rounds"] if kind == "adaptive" else 1)
    for source, round_, draw, latent, answer in zip(
        *(found[name] for name in ("source", "round", "draw", "latent", "predicted_label")), strict=True
    ):
        mu, _ = pair.encode_stored(stored.images[[source]])
        _, z = perturbations(
            noise_model_of(run), sd_agg, mu=mu, source=np.array([source]), round_=int(round_), draw=np.array([draw])
        )
        np.testing.assert_array_equal(z[0], latent)
        assert weak(rounded(pair.decode(z)))[0].argmax() == answer != stored.labels[source]


@pytest.mark.parametrize("kind", ["adaptive", "uniform"])
def test_failures_are_of_the_planted_weakness(alone: dict[str, Played], kind: str) -> None:
    """The planted fault: correct label, predicted as a bee when bright, never when dark."""
    found = alone[kind].found
    assert (truth(found["latent"]).argmax(axis=1) == found["true_label"]).all()
    is_bright = found["latent"][:, 2] > 0.5
    np.testing.assert_array_equal(found["predicted_label"] == BEE, is_bright)
    np.testing.assert_array_equal(found["true_label"] == BEE, ~is_bright)


@pytest.mark.parametrize("kind", ["adaptive", "uniform"])
def test_failures_pass_what_the_run_asks_of_them(alone: dict[str, Played], kind: str) -> None:
    """Every value recorded on a failure is one that the run's thresholds let pass."""
    found, wanted = alone[kind].found, alone[kind].run.config
    assert found["radius_sd"].max() <= wanted.validity.max_radius_sd
    assert found["round_trip_sd"].max() <= wanted.validity.max_round_trip_sd
    assert found["typicality"].min() >= np.float32(wanted.validity.min_typicality)
    assert found["label_probability"].min() >= np.float32(wanted.validity.min_label_probability)
    assert found["neighbour_agreement"].min() >= np.float32(wanted.validity.min_neighbour_agreement)
    assert np.bincount(found["source"]).max() <= wanted.search.max_failures_per_source


def test_an_adaptive_search_finds_at_least_twice_as_much(alone: dict[str, Played]) -> None:
    """An adaptive search finds twice the failures of a uniform one with as many decodes, and of more sources."""
    adaptive, uniform = alone["adaptive"], alone["uniform"]
    assert adaptive.end.counts.decodes <= uniform.end.counts.decodes
    assert adaptive.end.counts.failures >= 2 * uniform.end.counts.failures > 0
    assert len(set(adaptive.found["source"])) > len(set(uniform.found["source"]))


SEARCH: dict[str, Any] = {"draws_per_source": 6, "rounds": 4, "max_failures_per_source": 3, "shard_size": 110}
SHARDS = 3
SUMMED = ("decodes", "failures", "margin_sum", "margin_square_sum")


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> run_pb2.Run:
    """A run after its first two rounds."""
    run = workshop.prepared_run("two-rounds", search=SEARCH)
    for round_ in range(2):
        if round_:
            workshop.do(PLAN, work_pb2.PlanWork(run=run, round=round_, shard_count=SHARDS))
        for shard in range(SHARDS):
            workshop.do(IDENTIFY, work_pb2.IdentifyWork(run=run, shard=shard, round=round_))
    return run


def tallied(workshop: Workshop, run: run_pb2.Run, round_: int) -> dict[str, Array]:
    """Return what the shards of a round gave, one after the other."""
    return joined([dict(read_result(workshop.store, run.name, round_, shard).tally) for shard in range(SHARDS)])


def found_in(workshop: Workshop, run: run_pb2.Run, rounds: int) -> dict[str, Array]:
    found = workshop.found(run)
    return {name: array[found["round"] < rounds] for name, array in found.items()}


def assert_same(first: dict[str, Array], second: dict[str, Array]) -> None:
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_the_first_plan_is_made_of_the_first_round(workshop: Workshop, run: run_pb2.Run) -> None:
    """The sums of all shards are in source order, beside the margins of the sources."""
    tally = make_plan(workshop.context, run, 1, SHARDS).tally
    shards = tallied(workshop, run, 0)
    for name in SUMMED:
        np.testing.assert_array_equal(getattr(tally, name), shards[name], err_msg=name)
    read = joined([read_margins(workshop.store, run.name, shard)[0].arrays() for shard in range(SHARDS)])
    np.testing.assert_array_equal(tally.reconstruction_margin, read["reconstruction_margin"])
    np.testing.assert_array_equal(tally.runner_up, read["runner_up"])
    np.testing.assert_array_equal(tally.searchable, (read["image_margin"] > 0) & (read["reconstruction_margin"] > 0))
    np.testing.assert_array_equal(tally.first_decodes, tally.decodes)
    np.testing.assert_array_equal(tally.first_failures, tally.failures)
    assert tally.decodes.sum() > 250
    assert tally.failures.sum() == len(found_in(workshop, run, 1)["source"]) > 0


def test_later_plans_add_up_the_rounds(workshop: Workshop, run: run_pb2.Run) -> None:
    """The second plan knows both rounds, and still which was the first."""
    first, second = (make_plan(workshop.context, run, round_, SHARDS) for round_ in (1, 2))
    latest = tallied(workshop, run, 1)
    for name in SUMMED:
        np.testing.assert_array_equal(getattr(second.tally, name), getattr(first.tally, name) + latest[name])
    for name in ("searchable", "reconstruction_margin", "runner_up", "first_decodes", "first_failures"):
        np.testing.assert_array_equal(getattr(second.tally, name), getattr(first.tally, name))
    index = workshop.context.prepared(run).index
    by_source = np.bincount(found_in(workshop, run, 2)["source"], minlength=index.max() + 1)[index]
    np.testing.assert_array_equal(second.tally.failures, by_source)
    assert second.tally.failures.max() <= SEARCH["max_failures_per_source"]


@pytest.mark.parametrize("round_", [1, 2])
def test_failures_are_counted_by_confusion(workshop: Workshop, run: run_pb2.Run, round_: int) -> None:
    """Each source knows how often its label was taken for its runner-up, in all rounds so far."""
    tally = make_plan(workshop.context, run, round_, SHARDS).tally
    found = found_in(workshop, run, round_)
    labels = workshop.context.images(run, SEARCHED_SPLIT).labels
    expected = [
        int(((found["true_label"] == label) & (found["predicted_label"] == other)).sum())
        for label, other in zip(labels, tally.runner_up, strict=True)
    ]
    assert tally.confusion_failures.tolist() == expected
    assert sum(expected) > 0


def test_directions_are_learnt_from_all_rounds(workshop: Workshop, run: run_pb2.Run) -> None:
    """Directions are those of the sums of all shards and rounds, and lead where the planted weakness is."""
    first, second = (make_plan(workshop.context, run, round_, SHARDS) for round_ in (1, 2))
    sums = [
        read_result(workshop.store, run.name, round_, shard).sums.arrays()
        for round_ in range(2)
        for shard in range(SHARDS)
    ]
    for plan, parts in ((first, sums[:SHARDS]), (second, sums)):
        added = DirectionSums(**{name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]})
        np.testing.assert_allclose(plan.directions, added.directions(), atol=1e-9)
        assert added.count.sum() == plan.tally.decodes.sum()
    third = second.directions[:, 2]
    assert third[[0, 2]].max() < 0 < third[1]
    np.testing.assert_allclose(np.linalg.norm(second.directions, axis=1), 1)


@pytest.mark.parametrize("round_", [1, 2])
def test_a_plan_gives_out_its_share_of_what_is_left(workshop: Workshop, run: run_pb2.Run, round_: int) -> None:
    """A plan is the allocation of the tally; the budget that is left is spread over the rounds to come."""
    plan = make_plan(workshop.context, run, round_, SHARDS)
    left = 6 * int(plan.tally.searchable.sum()) - int(plan.tally.decodes.sum())
    share = left // (4 - round_)
    assert 0 < plan.decodes.sum() <= share
    expected = allocation.allocate(plan.tally, decodes=share, limit=3, uniform_decodes=6)
    np.testing.assert_array_equal(plan.decodes, expected)


@pytest.mark.parametrize(("rounds", "draws"), [(2, 1), (2, 7), (5, 3), (7, 6)])
def test_the_budget_is_spent_and_never_exceeded(workshop: Workshop, rounds: int, draws: int) -> None:
    """All rounds together decode at most what the configuration allows, and nearly all of it where there is room."""
    wanted = SEARCH | {"rounds": rounds, "draws_per_source": draws, "max_failures_per_source": 100}
    state = workshop.play(workshop.prepared_run(f"spent-{rounds}-{draws}", search=wanted))
    counts = state.counts
    searched = counts.sources - counts.sources_wrong_on_image - counts.sources_wrong_on_reconstruction
    assert counts.decodes <= draws * searched
    assert counts.decodes > 0.9 * min(draws, rounds) * searched


def test_without_a_budget_for_it_the_second_round_is_empty(workshop: Workshop) -> None:
    """One draw a source is spent by the first round: the plan of the second ends the search."""
    every_draw_is_decoded = {"min_label_probability": 0.0}
    run = workshop.prepared_run("one-draw", search=SEARCH | {"draws_per_source": 1}, validity=every_draw_is_decoded)
    state = workshop.play(run)
    assert (state.state, state.round) == (run_pb2.Run.STATE_DISTILLING, 0)


def test_a_plan_survives_the_store(workshop: Workshop, run: run_pb2.Run) -> None:
    """A plan is its arrays: read back, whole or mapped, it is the same."""
    plan = make_plan(workshop.context, run, 2, SHARDS)
    workshop.store.write_arrays("plans/copy", plan.arrays())
    for arrays in (workshop.store.read_arrays("plans/copy"), workshop.store.map_arrays("plans/copy")):
        again = RoundPlan.of(arrays)
        assert_same(again.arrays(), plan.arrays())
        assert {field.name for field in fields(RoundPlan)} == set(vars(again))


def test_the_first_round_prefers_nobody(workshop: Workshop, run: run_pb2.Run) -> None:
    """In the first round each searchable source gets one decode, or all of them where there are no rounds."""
    read, _ = read_margins(workshop.store, run.name, 1)
    first = first_allocation(run, read)
    np.testing.assert_array_equal(first.decodes, read.searchable)
    assert (first.round_, first.screen, first.directions, first.found.sum()) == (0, True, None, 0)
    np.testing.assert_array_equal(first.reconstruction_margin, read.reconstruction_margin)
    flat = workshop.new_run("flat", search=SEARCH | {"strategy": run_pb2.SearchConfig.STRATEGY_UNIFORM})
    uniform = first_allocation(flat, read)
    np.testing.assert_array_equal(uniform.decodes, 6 * read.searchable)
    assert not uniform.screen


def test_shards_get_their_part_of_a_plan(workshop: Workshop, run: run_pb2.Run) -> None:
    """The orders of all shards, one after the other, are the plan: nobody is left out or searched twice."""
    plan = make_plan(workshop.context, run, 2, SHARDS)
    parts = [planned_allocation(plan, run, 2, shard) for shard in range(SHARDS)]
    assert [len(part.decodes) for part in parts] == [110, 110, 80]
    np.testing.assert_array_equal(np.concatenate([part.decodes for part in parts]), plan.decodes)
    np.testing.assert_array_equal(np.concatenate([part.found for part in parts]), plan.tally.failures)
    margins = np.concatenate([part.reconstruction_margin for part in parts])
    np.testing.assert_array_equal(margins, plan.tally.reconstruction_margin)
    for part in parts:
        assert (part.round_, part.screen) == (2, True)
        np.testing.assert_array_equal(part.directions, plan.directions)
