"""The training stage: which weights each method moves, its data, and its results in the store."""

import re
import sys
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from defuse.v1.correction_pb2 import Correction, Training

from services.corrector import training as stage
from services.corrector.correction_data import CorrectionData
from services.corrector.finetune import LabelledDataset
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.unit.corrector.corrections import (
    CORRECTION,
    REGIONS,
    World,
    brightest,
    build,
    deployed_file,
    network,
    weights_of,
)

ALL = Training(method=Training.METHOD_ALL_WEIGHTS, region_weight=0.5, learning_rate=0.01)
LAST = Training(method=Training.METHOD_LAST_LAYER, region_weight=0.5, learning_rate=0.01)
LINE = Training(method=Training.METHOD_INTERPOLATION, region_weight=0.5, learning_rate=0.01)
SINGLE = Training(method=Training.METHOD_UNCLUSTERED, region_weight=0.5, learning_rate=0.01)
ON = Training(method=Training.METHOD_CONTINUED, learning_rate=0.01)


@pytest.fixture
def world(store: ArtifactStore) -> World:
    return build(store)


def test_a_training_leaves_a_measured_point(world: World) -> None:
    """The point says what it reads of test and held-out region images, as the file beside it does."""
    correction = world.correction(ALL, epochs=100)
    done = world.trained(correction)
    assert (done.method, done.region_weight, done.learning_rate) == (ALL.method, 0.5, 0.01)
    [point] = done.points
    assert (point.share, point.test.trials) == (1.0, 150)
    change = point.test_change
    assert change.value == pytest.approx((change.gained - change.lost) / 150)
    assert change.low < change.value < change.high
    # 256 fresh images around each of two regions, and some of the 40 held-out failures.
    assert 512 < point.regions.trials < 552
    assert point.regions.value > 0.9
    assert [entry.batch_size for entry in point.parity] == [1, 2, 16]
    assert max(entry.max_abs_difference for entry in point.parity) < 1e-4
    assert done.best_step <= done.steps


def test_all_weights_move_and_the_last_layer_alone(world: World) -> None:
    """Each method moves the weights that it says, and no others."""
    correction = world.correction(ALL, LAST)
    before = weights_of(deployed_file())
    for position, moved in ((0, {"wide", "wide_bias", "last", "last_bias"}), (1, {"last", "last_bias"})):
        world.trained(correction, position)
        after = world.weights(position)
        assert {name for name in before if (before[name] != after[name]).any()} == moved


def test_interpolation_makes_a_line_of_one_training(world: World) -> None:
    """Its points lie between the weights before and after, and its end is the training of all weights."""
    correction = world.correction(LINE, ALL)
    done = world.trained(correction, 0)
    world.trained(correction, 1)
    assert [point.share for point in done.points] == [0.2, 0.4, 0.6, 0.8, 1.0]
    before, after = weights_of(deployed_file()), world.weights(0, 4)
    for number, point in enumerate(done.points):
        for name, weight in world.weights(0, number).items():
            np.testing.assert_allclose(weight, before[name] + point.share * (after[name] - before[name]), atol=1e-6)
    for name, weight in world.weights(1).items():
        np.testing.assert_allclose(weight, after[name], atol=1e-6)


def test_training_on_reads_no_region(world: World) -> None:
    """Without regions, or with others, training on gives the same weights."""
    few, many = world.correction(ON, images_per_region=1), world.correction(ON, images_per_region=64)
    world.trained(few)
    one = world.weights()
    world.store.remove(keys.training(CORRECTION, 0))
    world.trained(many)
    for name, weight in world.weights().items():
        np.testing.assert_array_equal(weight, one[name])


@pytest.mark.parametrize(("failures", "distinct"), [(0, 2), (5, 5), (10_000, 80)])
def test_the_baseline_labels_single_failures(world: World, failures: int, distinct: int) -> None:
    """It learns from as many failures as there are regions, or as it is told, none of them held out."""
    correction = world.correction(SINGLE, unclustered_failures=failures, images_per_region=64)
    _, ready = stage.read_finetune_job(CorrectionData(world.store, correction), correction.trainings[0], [])
    regions = ready.data.regions
    images = regions.fetch(np.arange(len(regions)))
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == distinct
    assert len(images) >= 80
    usable = world.store.read_arrays("runs/first/results/000-00000.safetensors")
    known = {tuple(row) for row in np.clip(usable["failures.latent"], 0, 1)[usable["failures.held_out"] == 0]}
    assert {tuple(row) for row in images.reshape(len(images), -1)} <= known


def test_region_images_that_do_not_fit_in_memory_are_decoded_as_they_are_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images, whether they are kept or made anew for every batch."""
    correction = world.correction(ALL)
    rows = np.array([3, 60, 3])
    kept, made = (_region_images(world, correction, monkeypatch, limit).fetch(rows) for limit in (1 << 30, 0))
    np.testing.assert_allclose(kept, made, atol=1e-6)
    assert kept.shape == (3, 1, 2, 3)


def _region_images(
    world: World, correction: Correction, monkeypatch: pytest.MonkeyPatch, limit: int
) -> LabelledDataset:
    monkeypatch.setattr(stage, "_KEPT_BYTES", limit)
    _, ready = stage.read_finetune_job(CorrectionData(world.store, correction), correction.trainings[0], [])
    return ready.data.regions


def test_nothing_held_out_is_learned_from(world: World) -> None:
    """Evaluation uses images around sources that no region learns from; reported images evaluate nothing."""
    correction_data = CorrectionData(world.store, world.correction(ALL))
    deciding, reported = (
        {
            (region.region, *row)
            for region in correction_data.held_out_regions(deciding=half)
            for row in region.perturbations.latent.tolist()
        }
        for half in (True, False)
    )
    assert len(deciding) + len(reported) == 40
    assert deciding
    assert reported
    assert not deciding & reported
    learned = {tuple(row) for region in correction_data.regions() for row in region.failures.latent.tolist()}
    assert not {row[1:] for row in deciding | reported} & learned


def test_what_decides_reaches_beyond_the_failures(world: World) -> None:
    """Fresh latents around each region carry its label, spread wider than its failures, and are the same every time."""
    correction_data = CorrectionData(world.store, world.correction(ALL))
    around = correction_data.around_regions()
    assert [found.region for found in around] == list(REGIONS)
    for found, region in zip(around, correction_data.regions(), strict=True):
        drawn = found.perturbations.latent
        assert len(drawn) == 256
        assert (brightest(drawn) == found.label_id).all()
        assert drawn.std(axis=0).mean() > 1.2 * region.failures.latent.std(axis=0).mean()
    again = CorrectionData(world.store, world.correction(ALL)).around_regions()
    assert all(
        np.array_equal(one.perturbations.latent, other.perturbations.latent)
        for one, other in zip(around, again, strict=True)
    )


def test_a_training_is_made_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that is delivered again gives the event of the stored training; its checkpoint is gone."""
    correction = world.correction(ALL)
    first = world.trained(correction)
    assert not world.store.exists(keys.checkpoint(CORRECTION, 0))
    monkeypatch.setattr(stage, "_train", lambda *_: pytest.fail("it was trained again"))
    assert world.trained(correction) == first


def test_a_killed_training_goes_on_to_the_same_file(world: World) -> None:
    """Taken up from its checkpoint it leaves, byte for byte, the file that it would have left."""
    correction = world.correction(ALL, epochs=40)
    undisturbed = world.trained(correction)
    file = world.store.read_bytes(keys.onnx_file(keys.point(CORRECTION, 0, 0)))
    world.store.remove(keys.training(CORRECTION, 0))
    world.store.remove(keys.onnx_file(keys.point(CORRECTION, 0, 0)))
    with pytest.raises(KeyboardInterrupt):
        world.trained(correction, stop=lambda note: "step 50 of" in note)
    assert world.store.exists(keys.checkpoint(CORRECTION, 0))
    world.notes.clear()
    assert world.trained(correction) == undisturbed
    assert world.store.read_bytes(keys.onnx_file(keys.point(CORRECTION, 0, 0))) == file
    assert not any("step 10 of" in note for note in world.notes)


def test_notes_say_what_is_trained(world: World) -> None:
    """A person who watches a sweep reads method, lambda, learning rate and step."""
    world.trained(world.correction(LAST, epochs=10))
    assert any(note.startswith("last layer, lambda 0.5, learning rate 0.01: step 10 of ") for note in world.notes)


def test_a_graph_that_cannot_be_trained_names_the_other_way_in(store: ArtifactStore) -> None:
    """The error names the operator, and a torch factory with its options as the way around it."""
    world = build(store, file=deployed_file("com.acme.Frobnicate"))
    failed = world.trained(world.correction(ALL))
    assert re.search(r"Frobnicate .*module:function.*--torch-factory", failed.error)


def test_a_training_that_diverges_says_so_and_is_no_defect(world: World) -> None:
    """Nothing comes out of it but a sentence with the rate; it is not tried again."""
    wild = Training(method=ALL.method, region_weight=0.5, learning_rate=1e30)
    failed = world.trained(world.correction(wild, epochs=40))
    assert "diverged" in failed.error
    assert "1e+30 is too large" in failed.error
    assert not failed.points
    assert (failed.method, failed.region_weight) == (wild.method, 0.5)
    assert world.trained(world.correction(wild, epochs=40)) == failed


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a module that builds the deployed network; return the name of the function."""
    module = ModuleType("acme_nets")
    vars(module).update(build=network)
    monkeypatch.setitem(sys.modules, "acme_nets", module)
    return "acme_nets:build"


def uploaded_file(store: ArtifactStore, net: torch.nn.Module) -> str:
    store.write_bytes(keys.file("abc"), safetensors.torch.save(net.state_dict()))
    return "abc"


def test_a_torch_factory_is_trained_in_place_of_the_graph(world: World, plugin: str) -> None:
    """The factory's module computes the served model; it leaves a file with the served names, and its weights."""
    factory = {"function": plugin, "weights_digest": uploaded_file(world.store, network())}
    correction = world.correction(ALL, torch_factory=factory, epochs=100)
    [point] = world.trained(correction, factories=["acme_nets"]).points
    assert point.regions.value > 0.9
    prefix = keys.point(CORRECTION, 0, 0)
    kept = safetensors.torch.load(world.store.read_bytes(keys.weights_file(prefix)))
    assert (kept["wide.weight"] != network().wide.weight).any()
    assert set(kept) == set(network().state_dict())


def test_a_factory_that_computes_something_else_is_refused(world: World, plugin: str) -> None:
    """Other weights than the served ones would correct another model: the figure is named."""
    other = network()
    with torch.no_grad():
        other.last.bias.add_(1)
    factory = {"function": plugin, "weights_digest": uploaded_file(world.store, other)}
    failed = world.trained(world.correction(ALL, torch_factory=factory), factories=["acme_nets"])
    assert "differs by 1 from version 1" in failed.error


def test_a_factory_without_weights_is_refused(world: World, plugin: str) -> None:
    """The first correction of a version that did not come from a factory needs its weights."""
    failed = world.trained(world.correction(ALL, torch_factory={"function": plugin}), factories=["acme_nets"])
    assert re.search(r"no torch weights.*--weights", failed.error)
