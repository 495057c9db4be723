"""Splitting a region of a real run of the workshop, whose classifier takes ants and cats for bees."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from defuse.errors import NotFound, NotReady
from defuse.v1 import region_pb2, work_pb2

from services.distiller.assessment import DistillerDependencies
from services.distiller.worker import distill, split_region
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.unit.generator.run_fixture import Triton, Workshop, truth

RUN = "runs/first"
ANTS, CATS = f"{RUN}/regions/r1", f"{RUN}/regions/r3"


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistillerDependencies]:
    """Search and distill a run once; a test that splits has a region of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are slower on several, which wait for each other
    workshop = Workshop(ArtifactStore(f"file://{tmp_path_factory.mktemp('workshop')}"))
    run = workshop.new_run("first")
    state = workshop.play(run)
    work = work_pb2.DistillWork(run=run, shard_count=state.shard_count, round_count=state.round + 1)
    dependencies = DistillerDependencies(store=workshop.store, inference=workshop.triton)  # type: ignore[arg-type]
    distill(dependencies, work, Job(run.name, lambda _: None))
    yield dependencies
    torch.set_num_threads(threads)


def mixed(
    dependencies: DistillerDependencies,
    region_id: str,
    *,
    of: Sequence[str] = (ANTS, CATS),
    failures: int = 1000,
    key: str = "",
) -> str:
    """Leave a region of the failures of others, so many of each at most, beside those that the run found."""
    store, name = dependencies.store, f"{RUN}/regions/{region_id}"
    parts = [store.read_arrays(keys.region_arrays(other)) for other in of]
    members = ("latent", "source", "held_out_latent", "held_out_source")
    arrays = {field: np.concatenate([part[field][:failures] for part in parts]) for field in members}
    store.write_arrays(keys.region_arrays(name), arrays)
    key = key or keys.distillation(RUN)
    found = store.read_message(key, region_pb2.Distillation) if store.exists(key) else region_pb2.Distillation()
    found.regions.add(name=name, size=len(arrays["latent"]))
    store.write_message(key, found)
    return name


def latents(dependencies: DistillerDependencies, region: str) -> dict[str, Any]:
    """Return the latents of a region in an order of their own."""
    arrays = dependencies.store.read_arrays(keys.region_arrays(region))
    return {name: np.unique(arrays[name], axis=0) for name in ("latent", "held_out_latent")}


def test_a_mixed_region_becomes_regions_of_their_own(dependencies: DistillerDependencies) -> None:
    """Ants and cats in one region are told apart; each part has what every region has, and is named after the whole."""
    whole = mixed(dependencies, "r11")
    parts = split_region(dependencies, whole)
    assert {part.name for part in parts} == {f"{whole}-1", f"{whole}-2"}
    assert [part.score for part in parts] == sorted((part.score for part in parts), reverse=True)
    total = dependencies.store.read_message(keys.distillation(RUN), region_pb2.Distillation).counts.failures
    for part, like in zip(sorted(parts, key=lambda part: part.true_label), (ANTS, CATS), strict=True):
        record = Catalog(dependencies.store).region(like)
        assert (part.true_label, part.predicted_label) == (record.true_label, record.predicted_label)
        assert (part.size, part.held_out_size, part.radius_sd) == (record.size, record.held_out_size, record.radius_sd)
        assert part.weight == part.size / total
        assert part.error_rate.low > part.control_error_rate.high
        assert part.stability > 0.9
        assert Catalog(dependencies.store).region(part.name) == part
        for name, found in latents(dependencies, part.name).items():
            np.testing.assert_array_equal(found, latents(dependencies, like)[name])
        record_keys = [set(dependencies.store.read_arrays(keys.region_arrays(name))) for name in (part.name, like)]
        assert record_keys[0] == record_keys[1]


def test_splitting_twice_has_one_effect(dependencies: DistillerDependencies) -> None:
    """A stored split is returned unchanged, without any dependency."""
    whole = mixed(dependencies, "r12")
    parts = split_region(dependencies, whole)
    stored = [dependencies.store.read_bytes(keys.region_arrays(part.name)) for part in parts]
    again = split_region(DistillerDependencies(store=dependencies.store, inference=None), whole)  # type: ignore[arg-type]
    assert again == parts
    assert [dependencies.store.read_bytes(keys.region_arrays(part.name)) for part in again] == stored


def test_a_part_can_be_split_again(dependencies: DistillerDependencies) -> None:
    """Parts of a part carry its name."""
    whole = mixed(dependencies, "r13-2", key=keys.region_parts(f"{RUN}/regions/r13"))
    assert {part.name for part in split_region(dependencies, whole)} == {f"{whole}-1", f"{whole}-2"}


def test_what_cannot_be_told_apart(dependencies: DistillerDependencies) -> None:
    """A region without parts says so and what to do with it, and nothing is stored."""
    whole = mixed(dependencies, "r14", of=[ANTS], failures=3)
    with pytest.raises(NotReady, match=r"region 'r14' has no distinct parts.*3 failures.*invalid or unsure") as caught:
        split_region(dependencies, whole)
    assert caught.value.reason == "NOT_SEPARABLE"
    assert not dependencies.store.exists(keys.region_parts(whole))


def test_no_part_is_worse_than_its_controls(dependencies: DistillerDependencies) -> None:
    """Parts whose fresh decodes are read correctly are none; where no part is left, that is said."""
    whole = mixed(dependencies, "r15")
    right = DistillerDependencies(store=dependencies.store, inference=Triton(planted=truth))  # type: ignore[arg-type]
    with pytest.raises(NotReady, match=r"region 'r15' has 2 parts, but none") as caught:
        split_region(right, whole)
    assert caught.value.reason == "NO_PART_WORSE"
    assert not dependencies.store.exists(keys.region_parts(whole))


def test_an_unknown_region(dependencies: DistillerDependencies) -> None:
    """A region or part that is not there is named, with those that are."""
    with pytest.raises(NotFound, match=r"no region 'r1-7'; it has: r1, r2, r3"):
        split_region(dependencies, f"{ANTS}-7")
