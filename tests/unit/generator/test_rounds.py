"""A search in rounds, its stages played in turn: the same failures for all, found again, and many of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from defuse.v1 import run_pb2

from services.generator.draws import perturbations
from services.generator.pipeline import rounded
from services.generator.workbench import law_of
from services.storage import keys
from services.storage.keys import SEARCHED_SPLIT
from tests.unit.generator.workshop import BEE, SPLITS, Array, Workshop, truth, weak

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
    stored = workshop.bench.images(run, SEARCHED_SPLIT)
    pair, sd_agg = workshop.bench.codec(run.config), workshop.bench.prepared(run).sd_agg
    assert len(set(found["round"])) == (ADAPTIVE["rounds"] if kind == "adaptive" else 1)
    for source, round_, draw, latent, answer in zip(
        *(found[name] for name in ("source", "round", "draw", "latent", "predicted_label")), strict=True
    ):
        mu, _ = pair.encode_stored(stored.images[[source]])
        _, z = perturbations(
            law_of(run), sd_agg, mu=mu, source=np.array([source]), round_=int(round_), draw=np.array([draw])
        )
        np.testing.assert_array_equal(z[0], latent)
        assert weak(rounded(pair.decode(z)))[0].argmax() == answer != stored.labels[source]


@pytest.mark.parametrize("kind", ["adaptive", "uniform"])
def test_failures_are_of_the_planted_weakness(alone: dict[str, Played], kind: str) -> None:
    """What is found is the classifier's fault: still its label, and taken for a bee when bright, for none when dark."""
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
