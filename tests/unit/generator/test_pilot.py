"""The choice of a rendering, on the planted data set of the workshop."""

import numpy as np
import pytest
from defuse.v1 import run_pb2, work_pb2

from services.arrays import as_floats
from services.generator import pilot as subject
from services.generator.perturbations import perturbations
from services.generator.pipeline import rounded
from services.generator.run_context import noise_model_of
from services.latent_space import image_label_model
from services.latent_space.rendering import Renderer, SourceImages
from services.runtime.queue import IDENTIFY, PREPARE
from services.storage import keys
from services.storage.catalog import Catalog, estimate
from services.storage.keys import SEARCHED_SPLIT
from tests.unit.generator.run_fixture import Workshop, weak

Search = run_pb2.SearchConfig


def measured(*, lost: int, decoder: tuple[int, int], residual: tuple[int, int]) -> run_pb2.Pilot:
    """Return what a pilot of 200 sources measured: images lost, and valid failures of all misclassified images."""
    return run_pb2.Pilot(
        sources=200,
        reconstructions_lost=estimate(lost, 200),
        decoder={"decodes": 1600, "valid": estimate(*decoder)},
        residual={"decodes": 1600, "valid": estimate(*residual)},
    )


@pytest.mark.parametrize(
    ("pilot", "expected"),
    [
        (measured(lost=2, decoder=(30, 100), residual=(32, 100)), Search.RENDERING_DECODER),
        (measured(lost=2, decoder=(30, 100), residual=(50, 100)), Search.RENDERING_RESIDUAL),
        (measured(lost=2, decoder=(50, 100), residual=(30, 100)), Search.RENDERING_DECODER),
        (measured(lost=21, decoder=(90, 100), residual=(30, 100)), Search.RENDERING_RESIDUAL),
        (measured(lost=0, decoder=(0, 0), residual=(0, 0)), Search.RENDERING_DECODER),
    ],
)
def test_the_rule(pilot: run_pb2.Pilot, expected: int) -> None:
    """Losses to reconstruction rule the decoder out; else clearly more valid failures of residuals do."""
    assert subject.decide(pilot, 0.1).rendering == expected


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train label models on images for a moment only: the label of these pixels is easy to tell."""
    monkeypatch.setattr(image_label_model, "_LEAST_STEPS", 60)
    monkeypatch.setattr(image_label_model, "_MOST_STEPS", 60)


def prepare(workshop: Workshop, run: run_pb2.Run) -> work_pb2.Prepared:
    return workshop.do(PREPARE, work_pb2.PrepareWork(run=run)).prepared


@pytest.mark.usefixtures("_quick")
def test_a_vae_that_loses_nothing_is_searched_as_published(workshop: Workshop) -> None:
    """The choice, its figures and what follows from it are in the event, and in the run that others read."""
    run = workshop.new_run("open", rendering="AUTO")
    done = prepare(workshop, run)
    pilot, config = done.preflight.pilot, done.config
    assert pilot.rendering == config.search.rendering == Search.RENDERING_DECODER
    assert pilot.reconstructions_lost.value == 0
    assert pilot.sources == pilot.reconstructions_lost.trials == 200
    assert 0 < pilot.decoder.valid.trials < pilot.decoder.decodes == 1600
    assert config.validity.label_model == run_pb2.ValidityConfig.LABEL_MODEL_LATENT
    assert config.validity.min_label_probability == 0.998
    assert Catalog(workshop.store).run(run.name).config == config


@pytest.mark.usefixtures("_quick")
def test_a_vae_that_loses_images_changes_real_ones(workshop: Workshop) -> None:
    """Such a run is not refused; every failure is reproduced from its source and its draw."""
    run = workshop.new_run("lossy", rendering="AUTO", vae=workshop.coarse_pair(), search={"draws_per_source": 6})
    state = workshop.play(run)
    assert state.config.search.rendering == Search.RENDERING_RESIDUAL
    assert state.config.validity.label_model == run_pb2.ValidityConfig.LABEL_MODEL_IMAGE
    assert state.preflight.reconstruction_accuracy.value < 0.8
    assert state.counts.sources_wrong_on_reconstruction == 0
    found = workshop.found(state)
    assert len(found["source"]) > 5
    assert found["label_probability"].min() >= state.config.validity.min_label_probability
    pair, prepared = workshop.context.codec(state.config), workshop.context.prepared(state)
    stored = workshop.context.images(state, SEARCHED_SPLIT)
    mu, _ = pair.encode_stored(np.array(stored.images))
    render = Renderer(
        decode=pair.decode, sources=SourceImages(row=np.arange(len(mu)), mu=mu, images=np.array(stored.images))
    )
    for row, source in enumerate(found["source"]):
        _, z = perturbations(
            noise_model_of(state),
            prepared.sd_agg,
            mu=mu[[source]],
            source=np.array([source]),
            round_=found["round"][row],
            draw=found["draw"][[row]],
        )
        np.testing.assert_allclose(z[0], found["latent"][row], atol=1e-6)
        answer = weak(np.asarray(rounded(render(z, np.array([source])))))[0].argmax()
        assert answer == found["predicted_label"][row] != stored.labels[source]


@pytest.mark.usefixtures("_quick")
def test_a_choice_is_made_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that died behind the pilot leaves its choice to the next one."""
    run = workshop.new_run("once-chosen", rendering="AUTO")
    first = prepare(workshop, run)
    for key in (keys.preflight(run.name), keys.sources(run.name)):
        workshop.store.remove(key)
    monkeypatch.setattr("services.generator.preparation.run_pilot", lambda *_: pytest.fail("a second pilot"))
    assert prepare(workshop, run) == first


@pytest.mark.usefixtures("_quick")
def test_a_named_rendering_needs_no_pilot(workshop: Workshop) -> None:
    """With the rendering `residual` nothing is refused for reconstructions, and no image is changed without a step."""
    run = workshop.new_run("named", rendering="RESIDUAL", vae=workshop.coarse_pair())
    done = prepare(workshop, run)
    assert not done.preflight.HasField("pilot")
    assert done.config == run.config
    workshop.do(IDENTIFY, work_pb2.IdentifyWork(run=run, shard=0))
    margins = workshop.store.read_arrays(keys.shard_sources(run.name, 0))
    logits = weak(as_floats(np.array(workshop.context.images(run, SEARCHED_SPLIT).images)))
    labels = workshop.context.images(run, SEARCHED_SPLIT).labels
    assert ((margins["image_margin"] > 0) == (logits.argmax(axis=1) == labels)).all()
    np.testing.assert_array_equal(margins["reconstruction_margin"], margins["image_margin"])
