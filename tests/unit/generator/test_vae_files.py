import json
from dataclasses import asdict

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from services.generator.vae import Vae, decoder_onnx, encoder_onnx, from_bytes, new_vae, to_bytes
from tests.unit.generator.bars import config_for


def fresh(shape: tuple[int, int, int] = (1, 12, 10)) -> Vae:
    return new_vae(config_for(shape), torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 33)])
def test_onnx_gives_what_torch_gives(shape: tuple[int, int, int]) -> None:
    """Both halves agree with torch at batches of 1, 2 and 7, under the promised names."""
    vae = fresh(shape)
    encoder, decoder = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for data in (encoder_onnx(vae), decoder_onnx(vae))
    )
    for n in (1, 2, 7):
        draws = torch.Generator().manual_seed(n)
        images, z = torch.rand(n, *shape, generator=draws), torch.randn(n, 4, generator=draws)
        with torch.no_grad():
            (mu, sigma), decoded = vae.encode(images), vae.decode(z)
        for got, want in zip(encoder.run(["mu", "sigma"], {"images": images.numpy()}), (mu, sigma), strict=True):
            np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
        np.testing.assert_allclose(decoder.run(["images"], {"z": z.numpy()})[0], decoded.numpy(), atol=1e-5)


def test_bytes_round_trip() -> None:
    """A file gives back the config and, bit for bit, the decoder; loading draws nothing from torch's generator."""
    vae, before = fresh(), torch.get_rng_state()
    again = from_bytes(to_bytes(vae))
    assert torch.equal(before, torch.get_rng_state())
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert again.config == vae.config
    assert torch.equal(again.decode(z), vae.decode(z))


def test_a_file_of_before_the_likelihood_is_read() -> None:
    """A file whose config names neither likelihood nor shift is of a VAE that was trained without a choice of them."""
    vae = fresh()
    old = {name: value for name, value in asdict(vae.config).items() if name not in {"likelihood", "max_shift"}}
    again = from_bytes(safetensors.torch.save(vae.state_dict(), metadata={"vae": json.dumps(old)}))
    assert again.config == vae.config


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x80\x04}."])
def test_other_files_are_refused(data: bytes) -> None:
    """Any file not of to_bytes is a ValueError, a pickle included."""
    with pytest.raises(ValueError, match="no VAE file"):
        from_bytes(data)
