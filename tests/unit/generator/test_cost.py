import pytest
from defuse.errors import InvalidInput

from services.generator import vae_training
from services.generator.preparation import estimate_cost
from tests.unit.generator.bars import bars
from tests.unit.generator.onnx_pairs import encoder_file
from tests.unit.generator.run_fixture import SPLITS, Workshop


@pytest.mark.parametrize(("most", "sources"), [(0, SPLITS["val"]), (70, 70), (10**6, SPLITS["val"])])
def test_decodes_are_those_of_the_configuration(workshop: Workshop, most: int, sources: int) -> None:
    """A run decodes at most its draws for each source that it searches; each is read twice before."""
    run = workshop.new_run(f"cost-{most}", search={"max_sources": most, "draws_per_source": 7, "batch_size": 64})
    cost = estimate_cost(workshop.context, run.config)
    assert (cost.sources, cost.decodes, cost.training_s) == (sources, 7 * sources, 0)
    assert cost.decodes_per_s > 0
    assert cost.search_s == pytest.approx((7 + 2) * sources / cost.decodes_per_s)


def test_training_is_counted_until_it_is_done(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that is not trained yet takes what its images and epochs take, and nothing is left of the measurement."""
    workshop.triton.functions["dear"] = lambda images: images[:, 0, 0, :3]
    workshop.register("models/dear", (12, 10, 1))
    workshop.bring("datasets/dear", {split: (bars(40), bars(40)[:, 0, 0, 0] % 3) for split in ("train", "val")})
    vae = {"encoder_digest": "", "decoder_digest": "", "epochs": 30}
    run = workshop.new_run("dear", search={"batch_size": 16}, vae=vae)
    run.config.model, run.config.dataset = "models/dear", "datasets/dear"
    before = workshop.store.keys("vaes")
    assert estimate_cost(workshop.context, run.config).training_s > 0
    monkeypatch.setattr(vae_training, "seconds_per_image", lambda *_, **__: 0.5)
    assert estimate_cost(workshop.context, run.config).training_s == 0.5 * 40 * 30
    assert workshop.store.keys("vaes") == before


def test_a_pair_that_does_not_fit_is_refused_before_the_run(workshop: Workshop) -> None:
    """A cost estimate raises the errors that would refuse the run."""
    run = workshop.new_run("no-cost", vae={"encoder_digest": workshop.upload(encoder_file((3, 2, 2)))})
    with pytest.raises(InvalidInput, match="the encoder cannot take"):
        estimate_cost(workshop.context, run.config)
