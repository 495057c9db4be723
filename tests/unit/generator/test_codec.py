from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.arrays import as_floats, as_stored
from services.generator.codec import SD_FLOOR, Codec, CodecMismatch, aggregate_sd, as_array, onnx_codec, vae_codec
from services.generator.vae import VaeConfig, new_vae
from services.onnx_graph.onnx_files import onnx_function
from tests.unit.generator.onnx_pairs import SHAPE, decoder_file, encoder_file

Array = npt.NDArray[Any]
NAN = float("nan")


def opened(encoder: bytes, decoder: bytes) -> Codec:
    return onnx_codec(onnx_function(encoder), onnx_function(decoder), SHAPE)


def stored(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 2, 3, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def of_torch() -> Codec:
    config = VaeConfig.for_shape((1, 12, 10), 100, latent_dim=4, width=16)
    return vae_codec(new_vae(config, torch.Generator().manual_seed(0)), torch.device("cpu"))


def test_a_users_pair_is_a_codec() -> None:
    """Two ONNX files encode and decode as they say; without a second output the posterior is a point."""
    weight = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    pair = opened(encoder_file(weight=weight), decoder_file(dims=4))
    assert (pair.latent_dim, pair.image_shape) == (4, SHAPE)
    images = stored(5)
    mu, sigma = pair.encode_stored(images)
    np.testing.assert_allclose(mu, images.reshape(5, 6) / 255 @ weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sigma, np.zeros((5, 4)))
    z = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(pair.decode(z), np.clip(z, 0, 1)[:, [0, 1, 2, 3, 0, 1]].reshape(2, *SHAPE), rtol=1e-6)


def test_the_second_output_is_sigma() -> None:
    """A pair with two outputs says how wide its posteriors are."""
    factor = np.arange(1, 7, dtype=np.float32) / 10
    mu, sigma = opened(encoder_file(sigma=factor), decoder_file()).encode_stored(stored(3))
    assert mu.max() > 0.5
    np.testing.assert_allclose(sigma, factor * np.abs(mu), rtol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        (encoder_file((3, 2, 3)), decoder_file(), r"the encoder cannot take float32 \(2, 1, 2, 3\)"),
        (encoder_file((1, 3, 2)), decoder_file(), r"the encoder cannot take float32 \(2, 1, 2, 3\)"),
        (encoder_file(flat=False), decoder_file(), r"answers mu \(2, 1, 2, 3\) .* must be \(n, d\)"),
        (encoder_file(summed=True), decoder_file(), r"answers mu \(1, 6\) and sigma \(1, 6\) for two images"),
        (encoder_file(sigma=np.ones((2, 1, 6), np.float32)), decoder_file(), r"mu \(2, 6\) and sigma \(2, 2, 6\)"),
        (encoder_file(), decoder_file(dims=4), r"the decoder cannot take float32 \(2, 6\)"),
        (
            encoder_file(),
            decoder_file((2, 3, 1)),
            r"answers \(2, 2, 3, 1\) .* where \(2, 1, 2, 3\) is needed",
        ),
        (encoder_file(), decoder_file(scale=255.0, clipped=False), r"values from 127\.5 to 127\.5; .* in \[0, 1\]"),
        (encoder_file(), decoder_file(scale=-1.0, clipped=False), r"values from -0\.5 to -0\.5; .* in \[0, 1\]"),
        (encoder_file(), decoder_file(scale=2.0, clipped=False), r"values from -\S+ to \S+; .* in \[0, 1\]"),
        (encoder_file(), decoder_file(scale=NAN, clipped=False), r"values from nan to nan"),
        (decoder_file(), encoder_file(), "the encoder cannot take"),
    ],
)
def test_an_unfit_pair_is_refused_with_its_shapes(encoder: bytes, decoder: bytes, message: str) -> None:
    """A pair that does not fit the images, or each other, is refused by what it takes or answers."""
    with pytest.raises(CodecMismatch, match=message):
        opened(encoder, decoder)


def test_a_decoder_that_ends_linearly_is_clipped() -> None:
    """A decoder slightly beyond white and black is accepted; its images are clipped."""
    pair = opened(encoder_file(), decoder_file(clipped=False))
    z = np.linspace(-0.2, 1.2, 12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(pair.decode(z), z.clip(0, 1).reshape(2, *SHAPE))
    np.testing.assert_array_equal(pair.decode(torch.from_numpy(z)), pair.decode(z))


def test_a_trained_vae_is_a_codec(of_torch: Codec) -> None:
    """A VAE answers what its network answers, in float32; its pictures stay on its device, and may come back there."""
    config = VaeConfig.for_shape((1, 12, 10), 100, latent_dim=4, width=16)
    network = new_vae(config, torch.Generator().manual_seed(0)).eval()
    images = torch.rand(5, 1, 12, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.encode(images)
        decoded = network.decode(expected[0])
    mu, sigma = of_torch.encode(images.numpy())
    for got, want in zip((mu, sigma, of_torch.decode(mu)), (*expected, decoded), strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    np.testing.assert_array_equal(of_torch.decode(torch.from_numpy(mu)), of_torch.decode(mu))
    assert of_torch.decode(mu).is_contiguous()
    assert as_array(of_torch.decode(mu)).dtype == np.float32
    for got, want in zip(of_torch.encode(images), (mu, sigma), strict=True):
        np.testing.assert_array_equal(got, want)
    assert (of_torch.latent_dim, of_torch.image_shape) == (4, (1, 12, 10))


def test_a_picture_does_not_depend_on_its_batch(of_torch: Codec) -> None:
    """A latent decodes to the same picture, up to rounding, alone and among others."""
    z = np.random.default_rng(2).standard_normal((33, 4)).astype(np.float32)
    alone = np.concatenate([of_torch.decode(z[row : row + 1]) for row in range(33)])
    np.testing.assert_allclose(of_torch.decode(z), alone, atol=1e-6)


@pytest.mark.parametrize("count", [1, 512, 1100])
def test_stored_images_are_encoded_in_bounded_batches(count: int) -> None:
    """However many images there are, no call gets more than a few hundred, and the answers come in order."""
    sizes: list[int] = []
    plain = opened(encoder_file(), decoder_file())

    def encode(images: Array) -> tuple[Array, Array]:
        sizes.append(len(images))
        return plain.encode(images)

    watched = Codec(encode=encode, decode=plain.decode, latent_dim=6, image_shape=SHAPE)
    mu, sigma = watched.encode_stored(stored(count))
    np.testing.assert_allclose(mu, stored(count).reshape(count, 6) / 255, rtol=1e-6)
    assert sigma.shape == (count, 6)
    assert sum(sizes) == count
    assert max(sizes) <= 512


def test_no_images_have_no_latents() -> None:
    """No images are encoded without a question, as no rows with a column for each dimension."""
    for array in opened(encoder_file(), decoder_file()).encode_stored(stored(0)):
        assert array.shape == (0, 6)
        assert array.dtype == np.float32


def test_pixels_are_what_triton_is_sent() -> None:
    """Stored images become the same floats for the VAE as for the classifier, and come back as they were."""
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(3, axis=3)
    pixels = as_floats(images)
    np.testing.assert_array_equal(pixels, as_floats(images))
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(as_stored(pixels), images)


def test_dead_dimensions_stay_finite() -> None:
    """A dimension where mu is constant keeps a positive sd, so a radius can be divided by it."""
    mu = np.stack([np.linspace(-1, 1, 50), np.full(50, 0.3)], axis=1).astype(np.float32)  # (50, 2)
    sd = aggregate_sd(mu)
    assert sd == pytest.approx([mu[:, 0].std(), SD_FLOOR])
    step = np.float32(0.5) * sd
    np.testing.assert_allclose((mu + step - mu) / sd, 0.5, atol=1e-3)
