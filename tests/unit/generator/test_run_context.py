from dataclasses import replace

import numpy as np
import pytest
from defuse.errors import InvalidInput, NotFound, NotReady
from defuse.v1 import run_pb2

from services.generator.run_context import is_adaptive, noise_model_of, shard_slice, uploaded_pair
from services.storage import keys
from tests.unit.generator.onnx_pairs import decoder_file, encoder_file
from tests.unit.generator.run_fixture import SHAPE, Workshop, planted_images, truth, weak


def test_a_given_pair_is_opened() -> None:
    """Two files that fit the images are a codec."""
    pair = uploaded_pair(encoder_file(SHAPE), decoder_file(SHAPE), SHAPE)
    images, _ = planted_images(5, 0)
    np.testing.assert_allclose(pair.decode(pair.encode_stored(images)[0]).ravel(), images.ravel() / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "decoder", "part"),
    [(b"no ONNX", decoder_file(SHAPE), "encoder"), (encoder_file(SHAPE), b"", "decoder")],
)
def test_what_is_no_onnx_file_is_refused(encoder: bytes, decoder: bytes, part: str) -> None:
    """A file that ONNX Runtime cannot open is the caller's to change, named by its part."""
    with pytest.raises(InvalidInput, match=f"ONNX Runtime cannot open the {part}") as caught:
        uploaded_pair(encoder, decoder, SHAPE)
    assert caught.value.reason == "NOT_RUNNABLE"


def test_a_pair_that_does_not_fit_is_refused() -> None:
    """A pair made for other images is the caller's to change, with the shapes."""
    with pytest.raises(InvalidInput, match=r"the encoder cannot take float32 \(2, 1, 2, 2\)") as caught:
        uploaded_pair(encoder_file((3, 2, 2)), decoder_file(SHAPE), SHAPE)
    assert caught.value.reason == "UNFIT_VAE"


def test_a_vae_that_is_not_trained_yet(workshop: Workshop) -> None:
    """Before its preparation a run has no VAE, which is said so; it is looked for again the next time."""
    run = workshop.new_run("untrained", vae={"epochs": 77, "encoder_digest": "", "decoder_digest": ""})
    with pytest.raises(NotReady, match="not trained yet") as caught:
        workshop.context.codec(run.config)
    assert caught.value.reason == "NO_VAE"
    for part, data in (("encoder.onnx", encoder_file(SHAPE)), ("decoder.onnx", decoder_file(SHAPE))):
        workshop.store.write_bytes(keys.vae(run.config, part), data)
    assert workshop.context.codec(run.config).latent_dim == 4


def test_an_uploaded_pair_that_is_gone(workshop: Workshop) -> None:
    """A pair whose files are not in the store is not found."""
    run = workshop.new_run("gone", vae={"encoder_digest": "0" * 64})
    with pytest.raises(NotFound, match="files/000"):
        workshop.context.uploaded_codec(run.config)


def test_shards_are_ranges_of_sources(workshop: Workshop) -> None:
    """Every source belongs to exactly one shard."""
    run = workshop.prepared_run("sliced", search={"shard_size": 70})
    index = workshop.context.prepared(run).index
    parts = [index[shard_slice(run, shard)] for shard in range(6)]
    assert [len(part) for part in parts] == [70, 70, 70, 70, 20, 0]
    np.testing.assert_array_equal(np.concatenate(parts), index)


def test_sources_of_a_shard(workshop: Workshop) -> None:
    """A shard's sources have their places in the split, its labels and the marks of the preparation."""
    run = workshop.prepared_run("sourced", search={"shard_size": 70})
    mu = np.zeros((70, 4), np.float32)
    sources, prepared = workshop.context.sources(run, 2, mu), workshop.context.prepared(run)
    np.testing.assert_array_equal(sources.index, prepared.index[140:210])
    np.testing.assert_array_equal(sources.labels, planted_images(300, 1)[1][sources.index])
    np.testing.assert_array_equal(sources.held_out, prepared.held_out[140:210])
    assert sources.mu is mu


def test_the_noise_model_is_the_configuration(workshop: Workshop) -> None:
    """Seed, radius, limit, batch size and noise of a run make its law."""
    search = {"radius_sd": 0.7, "max_failures_per_source": 9, "batch_size": 33}
    run = workshop.new_run("law", seed=2**64 - 1, search=search)
    noise_model = noise_model_of(run)
    assert (noise_model.seed, noise_model.radius_sd, noise_model.max_failures_per_source, noise_model.batch_size) == (
        2**64 - 1,
        0.7,
        9,
        33,
    )
    assert not noise_model.released
    run.config.search.noise = run_pb2.SearchConfig.NOISE_RELEASED
    assert noise_model_of(run) == replace(noise_model, released=True)


def test_strategies(workshop: Workshop) -> None:
    """Adaptive is what is configured so, which is the default."""
    run = workshop.new_run("strategy")
    assert is_adaptive(run)
    run.config.search.strategy = run_pb2.SearchConfig.STRATEGY_UNIFORM
    assert not is_adaptive(run)


def test_models_are_those_of_the_run(workshop: Workshop) -> None:
    """The search asks the classifier under test and, only where the run has one, the oracle."""
    images = planted_images(40, 3)[0].reshape(40, *SHAPE) / np.float32(255)
    plain = workshop.context.models(workshop.prepared_run("plain"), np.ones(4))
    np.testing.assert_array_equal(plain.submit(images).result(), weak(images))
    assert plain.oracle is None
    run = workshop.prepared_run("doubted", validity={"oracle": "models/oracle", "oracle_version": 1})
    doubted = workshop.context.models(run, np.ones(4))
    np.testing.assert_array_equal(doubted.submit(images).result(), weak(images))
    assert doubted.oracle is not None
    np.testing.assert_array_equal(doubted.oracle(images).result(), truth(images))


def test_checks_are_those_of_the_configuration(workshop: Workshop) -> None:
    """Thresholds come from the configuration; two runs that differ in them share no checks."""
    strict = workshop.prepared_run("strict", validity={"max_radius_sd": 0.1, "max_round_trip_sd": 0.3})
    lenient = workshop.prepared_run("lenient", validity={"max_radius_sd": 2.0})
    values = np.array([0.05, 1.0, 3.0])
    for run, passes in ((strict, [True, False, False]), (lenient, [True, True, False])):
        [radius] = [check for check in workshop.context.checks(run).latent if check.field == "radius_sd"]
        assert np.asarray(radius.passes(values)).tolist() == passes
    assert workshop.context.checks(strict).max_round_trip_sd == 0.3
    assert workshop.context.checks(strict).screening is not None


def test_the_searched_split_is_not_the_test_split() -> None:
    """The search never sees the images that figures are told from."""
    assert keys.SEARCHED_SPLIT == "val"
