"""The label model: a classifier of latents that predicts their label.

It is trained on draws from the encoder's posterior of labelled training images. It does not use the classifier under
test, and gets no more of an image than the VAE kept, so it can judge whether a perturbed latent still shows its
source's label.
"""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.arrays import read_safetensors_header

# Arrays on the host, or tensors on the model's device.
A = TypeVar("A", npt.NDArray[Any], Tensor)
M = TypeVar("M", bound=nn.Module)
_WIDTH = 192
_STEPS = 1200
_BATCH = 256
_RATE = 4e-3
_WEIGHT_DECAY = 0.05
_HELD_OUT = 0.1  # share of the images that are only measured
_SD_FLOOR = 1e-3  # a dimension without spread is not scaled


class LabelModel(nn.Module):
    """A classifier of standardised latents, with two hidden layers.

    `mean` and `sd` (d,) are stored with the weights. `held_out_accuracy`, in [0, 1], is the accuracy on posterior means
    of images kept from training.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, latent_dim: int, n_classes: int, *, held_out_accuracy: float = float("nan")) -> None:
        super().__init__()
        self.latent_dim, self.n_classes, self.held_out_accuracy = latent_dim, n_classes, held_out_accuracy
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("sd", torch.ones(latent_dim))
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, n_classes)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return logits (n, k) of latents z (n, d)."""
        logits: Tensor = self.layers((z - self.mean) / self.sd)  # (n, d) -> (n, k)
        return logits


def train_label_model(
    mu: npt.NDArray[np.float32],
    sigma: npt.NDArray[np.float32],
    labels: npt.NDArray[np.integer],
    n_classes: int,
    *,
    seed: int,
    device: torch.device | str,
) -> LabelModel:
    """Return a label model trained on draws from posteriors.

    Draws are mu + sigma * eps of (n, d) posteriors with labels (n,) in 0..n_classes-1. Logits are adjusted by the log
    class frequencies in training, so that a rare label is not considered unlikely for being rare (Menon et al. 2021,
    arXiv:2007.07314). A label without images gets probability 0. Raises ValueError for shapes or labels that do not
    fit.
    """
    _check(mu, sigma, labels, n_classes)
    generator = torch.Generator().manual_seed(seed)
    held_out = choose_held_out(labels, generator)  # (n,) bool
    kept = [torch.tensor(a[~held_out], device=device) for a in (mu.astype(np.float32), sigma.astype(np.float32))]
    y = torch.tensor(labels[~held_out].astype(np.int64), device=device)
    model = _new_model(kept[0], kept[1], n_classes, generator).to(device)
    _fit(model, kept[0], kept[1], y, generator)
    model.held_out_accuracy = _accuracy(model, mu[held_out], labels[held_out])
    return model.eval()


def probability_of(model: LabelModel, z: A, labels: A) -> A:
    """Return the probability (n,) that each latent has its label.

    Latents z are (n, d), and labels are (n,). The result has the type of z.
    """
    if isinstance(z, Tensor):
        return _probabilities(model, z).gather(1, labels[:, None])[:, 0]
    device = model.mean.device
    latents = torch.tensor(z, dtype=torch.float32, device=device)
    ids = torch.tensor(labels, dtype=torch.int64, device=device)
    return probability_of(model, latents, ids).cpu().numpy()


def to_bytes(model: LabelModel) -> bytes:
    """Return a label model as one safetensors file.

    It has weights, standardisation and held-out accuracy.
    """
    return module_to_bytes(model, "label_model", ("latent_dim", "n_classes", "held_out_accuracy"))


def from_bytes(data: bytes) -> LabelModel:
    """Return the label model of a file of `to_bytes`.

    It is on the CPU, in eval mode. Raises ValueError for any other file.
    """
    return module_from_bytes(data, "label_model", LabelModel)


def module_to_bytes(module: nn.Module, kind: str, fields: Sequence[str]) -> bytes:
    """Return a network as one safetensors file, with the named fields that its class is called with."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    content = {name: getattr(module, name) for name in fields}
    return safetensors.torch.save(tensors, metadata={kind: json.dumps(content)})


def module_from_bytes(data: bytes, kind: str, build: Callable[..., M]) -> M:
    """Return the network of a file of `module_to_bytes`, on the CPU and in eval mode.

    `build` is its class. Raises ValueError for any other file.
    """
    try:
        header, _ = read_safetensors_header(io.BytesIO(data))
        fields = json.loads(header["__metadata__"][kind])
        with torch.device("meta"):
            module = build(**fields)
        module.load_state_dict(safetensors.torch.load(data), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        what = kind.replace("_", " ")
        raise ValueError(f"these {len(data)} bytes are no {what} ({error}): give a file of such a model") from error
    return module.eval()


def _check(
    mu: npt.NDArray[np.float32], sigma: npt.NDArray[np.float32], labels: npt.NDArray[np.integer], n_classes: int
) -> None:
    if mu.ndim != 2 or mu.shape != sigma.shape or labels.shape != mu.shape[:1] or len(mu) < 2:
        raise ValueError(f"mu {mu.shape}, sigma {sigma.shape}, labels {labels.shape}: give (n, d), (n, d), (n,), n > 1")
    check_class_ids(labels, n_classes)


def check_class_ids(labels: npt.NDArray[np.integer], n_classes: int) -> None:
    """Raise ValueError unless all labels (n,) are class ids."""
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels are {labels.min()}..{labels.max()}: give class ids from 0 to {n_classes - 1}")


def choose_held_out(labels: npt.NDArray[np.integer], generator: torch.Generator) -> npt.NDArray[np.bool_]:
    """Choose a tenth of each class (n,), and at least one image.

    Small classes are used for training entirely.
    """
    order = torch.randperm(len(labels), generator=generator).numpy()
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen[rows[: int(_HELD_OUT * len(rows))]] = True
    chosen[order[0]] |= not chosen.any()
    return chosen


def log_class_shares(labels: Tensor, n_classes: int) -> Tensor:
    """Return the log share (k,) of each class among labels (n,), 0 for one without images."""
    counts = torch.bincount(labels, minlength=n_classes)  # (k,)
    return torch.where(counts > 0, counts / len(labels), 1.0).log()


def _new_model(mu: Tensor, sigma: Tensor, n_classes: int, generator: torch.Generator) -> LabelModel:
    """Return a random model, standardised by the sd of the draws.

    The sd of mu alone would amplify the noise of dead dimensions, where mu is constant and sigma is one.
    """
    with torch.device("meta"):  # draws nothing from the global generator
        model = LabelModel(mu.shape[1], n_classes)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        bound = 1 / parameter[0].numel() ** 0.5 if parameter.ndim == 2 else 0.0  # biases start at zero
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    model.mean.copy_(mu.mean(dim=0))
    model.sd.copy_((mu.var(dim=0, correction=0) + (sigma**2).mean(dim=0)).sqrt().clamp_min(_SD_FLOOR))  # (d,)
    return model


def _fit(model: LabelModel, mu: Tensor, sigma: Tensor, y: Tensor, generator: torch.Generator) -> None:
    log_prior = log_class_shares(y, model.n_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        rows = torch.randint(len(y), (_BATCH,), generator=generator).to(y.device)
        eps = torch.randn((_BATCH, mu.shape[1]), generator=generator).to(y.device)
        logits = model(mu[rows] + sigma[rows] * eps)  # (b, k)
        loss = F.cross_entropy(logits + log_prior, y[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()


def _accuracy(model: LabelModel, mu: npt.NDArray[np.float32], labels: npt.NDArray[np.integer]) -> float:
    z = torch.tensor(mu, dtype=torch.float32, device=model.mean.device)
    return float((_probabilities(model, z).argmax(dim=1).cpu().numpy() == labels).mean())


@torch.inference_mode()
def _probabilities(model: LabelModel, z: Tensor) -> Tensor:
    probabilities: Tensor = model(z).softmax(dim=1)  # (n, k)
    return probabilities
