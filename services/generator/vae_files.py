"""A VAE as files: its weights for the search, its two halves as ONNX for everybody else."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from services.generator.vae import Vae, VaeConfig, empty_vae
from services.runtime.onnx_export import to_onnx


def to_bytes(vae: Vae) -> bytes:
    """Return weights and config as one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    data: bytes = safetensors.torch.save(tensors, metadata={"vae": json.dumps(asdict(vae.config))})
    return data


def from_bytes(data: bytes) -> Vae:
    """Return the Vae of a file that `to_bytes` wrote, on the CPU, in eval mode. ValueError: another file."""
    try:
        size = int.from_bytes(data[:8], "little")  # of the JSON header: https://huggingface.co/docs/safetensors
        fields = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["vae"])
        vae = empty_vae(VaeConfig(**fields | {"image_shape": tuple(fields["image_shape"])}))
        vae.load_state_dict(safetensors.torch.load(data), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"these {len(data)} bytes are no VAE file ({error}): write one with to_bytes") from error
    return vae.eval()


def encoder_onnx(vae: Vae) -> bytes:
    """Return an ONNX model: images (n, c, h, w) in [0, 1] -> mu, sigma (n, d); any n."""
    return to_onnx(_Half(vae, vae.encode), vae.config.image_shape, inputs=["images"], outputs=["mu", "sigma"])


def decoder_onnx(vae: Vae) -> bytes:
    """Return an ONNX model: z (n, d) -> images (n, c, h, w) in [0, 1]; any n."""
    return to_onnx(_Half(vae, vae.decode), (vae.config.latent_dim,), inputs=["z"], outputs=["images"])


class _Half(nn.Module):
    """One direction of a Vae as the module that the exporter wants."""

    def __init__(self, vae: Vae, direction: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.vae, self.direction = vae, direction

    def forward(self, x: Tensor) -> Any:
        return self.direction(x)
