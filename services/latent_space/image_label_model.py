"""The label model on images: a small convolutional network that predicts their label.

It is trained on labelled training images with light jitter, so that it judges rendered images as it judges real ones.
As the label model on latents, it does not use the classifier under test. It reads what a photograph's label hangs on,
which a small autoencoder loses (docs/explanation/method.md, "Validity").
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.arrays import Array, as_floats
from services.latent_space.label_model import (
    check_class_ids,
    choose_held_out,
    log_class_shares,
    module_from_bytes,
    module_to_bytes,
)
from services.latent_space.rendering import Resize, limited_size

# Largest side of the copies that it reads: finer detail costs time, and a rendered image has it from a real one.
_MAX_SIDE = 64
_WIDTHS = (32, 64, 128)
_BATCH = 128
_EPOCHS, _LEAST_STEPS, _MOST_STEPS = 20, 400, 1_200
_RATE, _WEIGHT_DECAY, _WARMUP = 4e-3, 0.05, 0.1
# Jitter: factors of brightness, contrast and each colour, share of a side for shifts, and noise, as uniform half widths
# and as a standard deviation.
_BRIGHTNESS, _CONTRAST, _COLOUR, _SHIFT, _NOISE = 0.3, 0.3, 0.15, 0.06, 0.03


class ImageLabelModel(nn.Module):
    """A classifier of images (n, c, h, w) in [0, 1], with a stride for each width.

    `held_out_accuracy`, in [0, 1], is the accuracy on images kept from training.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], n_classes: int, *, held_out_accuracy: float = float("nan")
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        self.image_shape, self.n_classes, self.held_out_accuracy = tuple(image_shape), n_classes, held_out_accuracy
        self.reduce = Resize((size[0], size[1]), limited_size(size[0], size[1], _MAX_SIDE))
        inputs = [channels, *_WIDTHS[:-1]]
        blocks = [_block(given, wanted) for given, wanted in zip(inputs, _WIDTHS, strict=True)]
        self.layers = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * _WIDTHS[-1], n_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, k) of images (n, c, h, w) in [0, 1]."""
        return self.of_copies(self.reduce(images))

    def of_copies(self, copies: Tensor) -> Tensor:
        """Return logits (n, k) of images at the network's own size."""
        logits: Tensor = self.layers(copies - 0.5)
        return logits


def train_image_label_model(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    n_classes: int,
    *,
    seed: int,
    device: torch.device | str,
) -> ImageLabelModel:
    """Return a label model trained on stored images (n, h, w, c) with labels (n,) in 0..n_classes-1.

    Logits are adjusted by the log class frequencies in training, as those of the label model on latents. Raises
    ValueError for shapes or labels that do not fit.
    """
    _check(images, labels, n_classes)
    generator = torch.Generator().manual_seed(seed)
    held_out = choose_held_out(labels, generator)  # (n,) bool
    rows = np.flatnonzero(~held_out)
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
        torch.manual_seed(seed)
        _, height, width, channels = images.shape
        model = ImageLabelModel((channels, height, width), n_classes).to(device)
    _fit(model, images, torch.tensor(labels.astype(np.int64), device=device), rows, generator)
    model.eval()
    told = np.concatenate(
        [image_probabilities(model, as_floats(images[part])).argmax(axis=1) for part in _parts(held_out)]
    )
    model.held_out_accuracy = float((told == labels[held_out]).mean())
    return model


@torch.inference_mode()
def image_probabilities(model: ImageLabelModel, images: Array | Tensor) -> Array:
    """Return the probabilities (n, k) of the classes of images (n, c, h, w) in [0, 1]."""
    device = next(model.parameters()).device
    return np.asarray(model(torch.as_tensor(images).to(device)).softmax(dim=1).cpu().numpy())


def probability_of_label(model: ImageLabelModel, images: Array | Tensor, labels: Array) -> Array:
    """Return the probability (n,) that each image (n, c, h, w) has its label (n,)."""
    return np.asarray(image_probabilities(model, images)[np.arange(len(labels)), labels])


def image_label_model_bytes(model: ImageLabelModel) -> bytes:
    """Return an image label model as one safetensors file."""
    return module_to_bytes(model, "image_label_model", ("image_shape", "n_classes", "held_out_accuracy"))


def read_image_label_model(data: bytes) -> ImageLabelModel:
    """Return the model of a file of `image_label_model_bytes`, on the CPU and in eval mode.

    Raises ValueError for any other file.
    """
    return module_from_bytes(data, "image_label_model", ImageLabelModel)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (b, c, h, w) in [0, 1], lightly changed: brightness, contrast, colour, shifts and noise."""
    count, channels, height, width = images.shape

    def factors(spread: float, *shape: int) -> Tensor:
        drawn = torch.rand((count, *shape), generator=generator)
        return (1 + spread * (2 * drawn - 1)).to(images.device)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    changed = mean + (images - mean) * factors(_CONTRAST, 1, 1, 1)
    changed = changed * factors(_BRIGHTNESS, 1, 1, 1) * factors(_COLOUR, channels, 1, 1)
    changed = changed + (_NOISE * torch.randn(images.shape, generator=generator)).to(images.device)
    return _shifted(changed.clamp(0, 1), max(1, round(_SHIFT * max(height, width))), generator)


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift images by up to `most` pixels each way; edges are repeated."""
    _, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, len(images)), generator=generator).to(images.device)
    rows = down[:, None] + torch.arange(height, device=images.device)  # (b, h)
    columns = right[:, None] + torch.arange(width, device=images.device)  # (b, w)
    at = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[at, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _block(given: int, wanted: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(given, wanted, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(wanted),
        nn.ReLU(inplace=True),
        nn.Conv2d(wanted, wanted, 3, padding=1, bias=False),
        nn.BatchNorm2d(wanted),
        nn.ReLU(inplace=True),
    )


def _fit(
    model: ImageLabelModel,
    images: npt.NDArray[np.uint8],
    labels: Tensor,
    rows: npt.NDArray[np.integer],
    generator: torch.Generator,
) -> None:
    log_shares = log_class_shares(labels[torch.as_tensor(rows, device=labels.device)], model.n_classes)
    steps = int(np.clip(_EPOCHS * len(rows) // _BATCH, _LEAST_STEPS, _MOST_STEPS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=_WARMUP)
    model.train()
    for _ in range(steps):
        # Ascending rows read a mapped file in its own order.
        chosen = np.sort(rows[torch.randint(len(rows), (_BATCH,), generator=generator).numpy()])
        batch = torch.as_tensor(as_floats(images[chosen])).to(labels.device)
        logits = model.of_copies(jitter(model.reduce(batch), generator))
        loss = F.cross_entropy(logits + log_shares, labels[torch.as_tensor(chosen, device=labels.device)])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def _parts(mask: npt.NDArray[np.bool_]) -> list[Any]:
    rows = np.flatnonzero(mask)
    return [rows[begin : begin + 4 * _BATCH] for begin in range(0, len(rows), 4 * _BATCH)]


def _check(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], n_classes: int) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1] or len(images) < 2:
        raise ValueError(
            f"images {images.dtype} {images.shape}, labels {labels.shape}: give uint8 (n, h, w, c), (n,), n > 1"
        )
    check_class_ids(labels, n_classes)
