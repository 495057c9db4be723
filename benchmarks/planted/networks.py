"""Networks of the planted benchmark: classifier, oracle, ceiling and fine-tuned baselines."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.stand import Array
from services.arrays import as_floats
from services.corrector.finetune import DRAWS, Augmentation
from services.corrector.training_state import Schedule
from services.demo.classifier import statistics
from services.onnx_graph import onnx_files

_WIDTHS, _HIDDEN = (32, 64, 128), 128
# Images that a training from scratch sees, as passes within these bounds: 3 for MNIST, 6 for GTSRB, 15 for small data.
_SEEN, _EPOCHS = 90_000, (3, 15)
_RATE, _BATCH = 2e-3, 64
# The larger one of the rates that corrections try.
_TUNING_RATE = 1e-3
_AT_ONCE = 256
# Bounds of the jitter, the usual ones of image augmentation: brightness in [0, 1], factors, share of the side.
_BRIGHTNESS, _CONTRAST, _COLOUR, _SHIFT = 0.3, 0.3, 0.2, 1 / 16


class PlantedNetwork(nn.Module):
    """Three convolutions and two linear layers.

    It maps normalised images (n, c, h, w) to logits (n, k).
    """

    def __init__(self, image_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        height, width, channels = image_shape
        layers: list[nn.Module] = []
        for before, after in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        scale = 2 ** len(_WIDTHS)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(_WIDTHS[-1] * (height // scale) * (width // scale), _HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(_HIDDEN, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


@dataclass(frozen=True, kw_only=True)
class LabelledArrays:
    """Images (n, h, w, c) uint8 with labels (n,)."""

    images: Array
    labels: Array
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        content.update(str(self.images.shape).encode() + self.labels.astype(np.int64).tobytes())
        object.__setattr__(self, "digest", content.hexdigest())


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A network with the normalisation of its inputs."""

    network: PlantedNetwork
    mean: list[float]
    std: list[float]
    image_shape: tuple[int, ...]
    # Of everything that it was made from.
    digest: str

    def prepare(self, images: Array) -> Tensor:
        """Return inputs of images (n, h, w, c) uint8."""
        return self.normalise(as_floats(images))

    def normalise(self, images: Array) -> Tensor:
        """Return inputs of images (n, c, h, w) in [0, 1]."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return torch.from_numpy(np.asarray((images - mean) / std, np.float32))

    def answers(self, images: Array) -> Array:
        """Return the predicted labels (n,) of images (n, h, w, c) uint8."""
        return np.asarray(self._outputs(self.network, images).argmax(axis=1))

    def penultimate(self, images: Array) -> Array:
        """Return the features (n, d) from which the last layer makes logits."""
        return self._outputs(nn.Sequential(self.network.features, *self.network.head[:-1]), images)

    def convolved(self, images: Array) -> Array:
        """Return the features (n, d) that enter the head."""
        return self._outputs(self.network.features, images)

    def to_onnx(self) -> bytes:
        height, width, channels = self.image_shape
        return onnx_files.to_onnx(self.network, (channels, height, width), inputs=["images"], outputs=["logits"])

    def _outputs(self, module: nn.Module, images: Array) -> Array:
        module.eval()
        with torch.inference_mode():
            parts = [
                module(self.prepare(images[begin : begin + _AT_ONCE])).numpy()
                for begin in range(0, max(1, len(images)), _AT_ONCE)
            ]
        return np.concatenate(parts)


def train_afresh(data: LabelledArrays, *, classes: int, seed: int, cache: Path, epochs: int = 0) -> TrainedNetwork:
    """Train the network from scratch, or take it from the cache.

    Without `epochs`, small data is passed more often than large data.
    """
    schedule = _afresh_schedule(len(data.labels), epochs, seed)
    mean, std = statistics(data.images)
    torch.manual_seed(seed)
    made = TrainedNetwork(
        network=PlantedNetwork(data.images.shape[1:], classes),
        mean=mean,
        std=std,
        image_shape=data.images.shape[1:],
        digest=_digest("afresh", data.digest, classes, schedule),
    )

    def train() -> None:
        made.network.train()
        fit(made.network, lambda rows: made.prepare(data.images[rows]), data.labels, schedule)

    return _kept(made, cache, train)


def tune(
    deployed: TrainedNetwork, data: LabelledArrays, *, epochs: int, seed: int, jitter: bool, cache: Path
) -> TrainedNetwork:
    """Fine-tune the deployed network on data without regions.

    As in a correction, whose network is a served graph, normalisation statistics stay as they are, and nothing is
    dropped out: only the data differ.
    """
    name = "jitter" if jitter else "continued"
    made = _copy(deployed, _digest(name, deployed.digest, data.digest, epochs, seed))
    random = np.random.default_rng(seed)

    def inputs(rows: Array) -> Tensor:
        images = as_floats(data.images[rows])
        return made.normalise(jittered(images, random) if jitter else images)

    def train() -> None:
        fit(made.network.eval(), inputs, data.labels, tuning_schedule(epochs, seed))

    return _kept(made, cache, train)


def refit_head(
    deployed: TrainedNetwork, data: LabelledArrays, *, seed: int, cache: Path, epochs: int = 0
) -> TrainedNetwork:
    """Make the linear layers of the deployed network afresh.

    They are trained as long as a network that is trained from scratch.
    """
    schedule = _afresh_schedule(len(data.labels), epochs, seed)
    made = _copy(deployed, _digest("refit", deployed.digest, data.digest, schedule))

    def train() -> None:
        torch.manual_seed(seed)
        for layer in made.network.head:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        features = torch.from_numpy(deployed.convolved(data.images))
        fit(made.network.head.train(), lambda rows: features[rows], data.labels, schedule)

    return _kept(made, cache, train)


def tuning_schedule(epochs: int, seed: int) -> Schedule:
    """Return the schedule of a correction, without regions."""
    return Schedule(epochs=epochs, learning_rate=_TUNING_RATE, region_weight=0.0, seed=seed)


def fit(module: nn.Module, inputs: Callable[[Array], Tensor], labels: Array, schedule: Schedule) -> None:
    """Train a module in place on the inputs of rows.

    It stays in its mode, training or evaluation, until the end.
    """
    torch.manual_seed(schedule.seed)
    random = np.random.default_rng(schedule.seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=schedule.learning_rate)
    targets, size = torch.from_numpy(labels.astype(np.int64)), schedule.batch_size
    epochs = schedule.epochs_over(len(labels))
    step, steps = 0, epochs * -(-len(labels) // size)
    for _ in range(epochs):
        order = random.permutation(len(labels))
        for begin in range(0, len(order), size):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at((step + 0.5) / steps)
            step += 1
            rows = order[begin : begin + size]
            loss = F.cross_entropy(module(inputs(rows)), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
    module.eval()


def jittered(images: Array, random: np.random.Generator) -> Array:
    """Return images (n, c, h, w) in [0, 1] with random changes.

    They change brightness, contrast and colours, and shift the image a little.
    """
    n, c = images.shape[:2]

    def around(bound: float, *shape: int) -> Array:
        return random.uniform(-bound, bound, shape).astype(np.float32)

    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    changed = (images - mean) * (1 + around(_CONTRAST, n, 1, 1, 1)) + mean + around(_BRIGHTNESS, n, 1, 1, 1)
    if c > 1:
        changed = changed * (1 + around(_COLOUR, n, c, 1, 1))
    return Augmentation(max_shift=_SHIFT)(np.clip(changed, 0, 1), random.random((n, DRAWS)))


def _afresh_schedule(count: int, epochs: int, seed: int) -> Schedule:
    epochs = epochs or int(np.clip(-(-_SEEN // count), *_EPOCHS))
    return Schedule(epochs=epochs, learning_rate=_RATE, region_weight=0.0, seed=seed, batch_size=_BATCH)


def _copy(deployed: TrainedNetwork, digest: str) -> TrainedNetwork:
    return TrainedNetwork(
        network=copy.deepcopy(deployed.network),
        mean=deployed.mean,
        std=deployed.std,
        image_shape=deployed.image_shape,
        digest=digest,
    )


def _digest(*parts: object) -> str:
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(repr((*parts, recipe, torch.__version__)).encode()).hexdigest()


def _kept(made: TrainedNetwork, cache: Path, train: Callable[[], None]) -> TrainedNetwork:
    """Train a network unless the cache has its weights."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"planted-{made.digest[:24]}.safetensors"
    if file.exists():
        made.network.load_state_dict(safetensors.torch.load(file.read_bytes()))
    else:
        train()
        partial = file.with_suffix(".partial")
        partial.write_bytes(safetensors.torch.save(made.network.state_dict()))
        partial.replace(file)
    made.network.eval()
    return made
