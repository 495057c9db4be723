import numpy as np
import pytest
from defuse.errors import Cancelled, InvalidInput, NotReady
from defuse.v1 import run_pb2, work_pb2

from services.generator import preparation, run_vae, validity
from services.generator.vae import VaeConfig
from services.latent_space import label_model
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.runtime.queue import PREPARE
from services.storage import keys
from services.storage.keys import SEARCHED_SPLIT
from tests.unit.generator.onnx_pairs import decoder_file, encoder_file
from tests.unit.generator.run_fixture import SHAPE, SPLITS, Workshop, planted_images, weak


def prepare(workshop: Workshop, run: run_pb2.Run) -> work_pb2.Prepared:
    return workshop.do(PREPARE, work_pb2.PrepareWork(run=run)).prepared


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train label models for a moment only, where a test is not about them."""
    monkeypatch.setattr(label_model, "_STEPS", 2)


def test_preparation_says_what_it_measured(workshop: Workshop) -> None:
    """The event has the number of sources, and what preflight measured on labelled images, with intervals."""
    done = prepare(workshop, workshop.prepared_run("told"))
    images, labels = planted_images(SPLITS["val"], 1)
    right = int((weak(images.reshape(-1, 4) / np.float32(255)).argmax(axis=1) == labels).sum())
    accuracy = done.preflight.accuracy
    assert (done.source_count, accuracy.successes, accuracy.trials) == (300, right, 300)
    assert accuracy.low < accuracy.value == right / 300 <= accuracy.high
    assert done.preflight.reconstruction_accuracy.value == 1  # this VAE loses nothing
    assert done.preflight.reconstruction_accuracy.trials == right
    assert done.preflight.label_model_accuracy > 0.97


def test_validity_is_told_from_training_images(workshop: Workshop) -> None:
    """Label model, references and latent scale are of the training split, in the run's own latent space."""
    run = workshop.prepared_run("described")
    images, labels = planted_images(SPLITS["train"], 0)
    mu = images.reshape(-1, 4) / 255
    prepared = workshop.context.prepared(run)
    np.testing.assert_allclose(prepared.sd_agg, mu.std(axis=0), rtol=1e-4)
    reference = validity.Reference(**workshop.store.read_arrays(keys.reference(run.config)))
    np.testing.assert_allclose(reference.latent * prepared.sd_agg, mu, atol=1e-5)
    np.testing.assert_array_equal(reference.label, labels)
    model = label_model.from_bytes(workshop.store.read_bytes(keys.label_model(run.config)))
    assert (label_model.probability_of(model, mu.astype(np.float32), labels) > 0.9).mean() > 0.97
    probability = label_model.probability_of(model, mu.astype(np.float32), labels)
    carried = RunImages(workshop.store, run).carry(Perturbations(latent=mu, source=np.full(len(mu), -1)), labels)
    decided = abs(probability - run.config.validity.min_label_probability) > 1e-5
    np.testing.assert_array_equal(carried[decided], (probability >= run.config.validity.min_label_probability)[decided])


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_sources_are_drawn_by_seed(workshop: Workshop, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any seed draws at most as many sources and references as there may be, and which are kept out of correction."""
    monkeypatch.setattr(preparation, "MAX_REFERENCES", 100)
    search = {"max_sources": 200, "held_out_fraction": 0.4}
    run, again = (workshop.new_run(f"{name}-{seed}", seed=seed, search=search) for name in ("drawn", "again"))
    assert prepare(workshop, run).source_count == 200
    prepared = workshop.context.prepared(run)
    assert len(set(prepared.index)) == 200
    assert (np.diff(prepared.index) > 0).all()
    assert prepared.index.max() < SPLITS[SEARCHED_SPLIT]
    assert prepared.held_out.mean() == pytest.approx(0.4, abs=0.1)
    reference = workshop.store.read_arrays(keys.reference(run.config))
    assert reference["latent"].shape == (100, 4)
    prepare(workshop, again)
    for name, array in workshop.context.prepared(again).arrays().items():
        np.testing.assert_array_equal(array, prepared.arrays()[name], err_msg=name)


def test_a_run_is_prepared_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that comes twice gets the same answer, and nobody is asked again."""
    run = workshop.prepared_run("once-prepared")
    once = prepare(workshop, run)
    monkeypatch.setitem(workshop.triton.functions, "planted", lambda _: pytest.fail("the classifier was asked"))
    assert prepare(workshop, run) == once


def test_a_classifier_that_reads_something_else_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preprocessing that does not match is found before anything is trained, and refused with its figures."""
    run = workshop.new_run("mismatch", preflight={"declared_accuracy": 0.9}, vae={"seed": 1})
    monkeypatch.setitem(workshop.triton.functions, "planted", lambda images: weak(images)[:, [1, 2, 0]])
    with pytest.raises(NotReady, match=r"reads \d+ of 300 labelled images correctly .* 0.9 is declared") as caught:
        prepare(workshop, run)
    assert caught.value.reason == "PREPROCESSING_MISMATCH"
    assert not workshop.store.exists(keys.vae(run.config, "decoder.onnx"))
    assert not workshop.store.exists(keys.label_model(run.config))


@pytest.mark.usefixtures("_quick")
def test_a_vae_that_loses_too_much_is_refused(workshop: Workshop) -> None:
    """A VAE whose reconstructions the classifier misreads is refused, and the run has no sources."""
    run = workshop.new_run("coarse", vae=workshop.coarse_pair())
    with pytest.raises(NotReady, match=r"misreads \d+ \(.*as unperturbed reconstructions.* 0.1 is allowed") as caught:
        prepare(workshop, run)
    assert caught.value.reason == "VAE_TOO_COARSE"
    assert not workshop.store.exists(keys.sources(run.name))


@pytest.mark.usefixtures("_quick")
def test_what_is_allowed_is_not_refused(workshop: Workshop) -> None:
    """The same VAE is taken by a run that allows the loss."""
    run = workshop.new_run("allowed", vae=workshop.coarse_pair(), preflight={"max_reconstruction_loss": 0.9})
    reconstructions = prepare(workshop, run).preflight.reconstruction_accuracy
    assert reconstructions.value < 0.8


@pytest.mark.usefixtures("_quick")
def test_a_pair_is_taken_for_the_run(workshop: Workshop) -> None:
    """An uploaded pair is what everybody finds as the run's encoder and decoder, byte for byte."""
    encoder, decoder = encoder_file(SHAPE, sigma=np.full(4, 0.01, np.float32)), decoder_file(SHAPE)
    given = {"encoder_digest": workshop.upload(encoder), "decoder_digest": workshop.upload(decoder)}
    run = workshop.new_run("brought", vae=given)
    prepare(workshop, run)
    assert workshop.store.read_bytes(keys.vae(run.config, "encoder.onnx")) == encoder
    assert workshop.store.read_bytes(keys.vae(run.config, "decoder.onnx")) == decoder


def test_a_pair_that_does_not_fit_is_refused(workshop: Workshop) -> None:
    """A pair for other images is refused as the caller's, and nothing of it is taken."""
    run = workshop.new_run("unfit", vae={"encoder_digest": workshop.upload(encoder_file((3, 2, 2)))})
    with pytest.raises(InvalidInput, match="the encoder cannot take") as caught:
        prepare(workshop, run)
    assert caught.value.reason == "UNFIT_VAE"
    assert not workshop.store.exists(keys.vae(run.config, "encoder.onnx"))


@pytest.mark.usefixtures("_quick")
def test_a_cancelled_preparation_stops(workshop: Workshop) -> None:
    """A run cancelled while it is prepared has nothing to search."""
    run = workshop.new_run("cancelled")
    job = workshop.job(run)
    job.cancel()
    with pytest.raises(Cancelled):
        preparation.prepare(workshop.context, work_pb2.PrepareWork(run=run), job)
    assert not workshop.store.exists(keys.sources(run.name))


@pytest.mark.usefixtures("_quick")
def test_preparation_says_what_it_does(workshop: Workshop) -> None:
    """Progress rises, belongs to this stage, and says in words what is done."""
    run = workshop.new_run("spoken")
    before = len(workshop.said)
    prepare(workshop, run)
    said = [event.progress for event in workshop.said[before:]]
    assert [step.progress for step in said] == sorted(step.progress for step in said)
    assert all(step.state == run_pb2.Run.STATE_PREPARING for step in said)
    assert "asking the served classifier" in said[0].note


@pytest.mark.parametrize("given", [{}, {"latent_dim": 5, "epochs": 2}, {"beta": 0.125}])
def test_vae_settings_left_at_0_take_what_fits(given: dict[str, float]) -> None:
    """Missing settings follow from the shape and number of training images."""
    wanted = run_pb2.VaeConfig(**given)  # type: ignore[arg-type]  # a float for each
    config = run_vae.vae_config(wanted, (3000, 28, 24, 1))
    assert config == VaeConfig.for_shape((1, 28, 24), 3000, **given)
