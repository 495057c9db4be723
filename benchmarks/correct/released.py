"""The released recipe's correction, written anew from its description.

scikit-learn's mixture over latents alone, components heavier than 0.01, 64 samples of each from N(mean, 0.01 Sigma);
loss CE(original) + 0.01 CE(regions), SGD 1e-3 with momentum 0.9, 15 epochs. It restarts from weights of ImageNet; here
it starts from the deployed ones, which can only help it; a component's label is the one most of its failures carry.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.regions.released import heavy_components
from benchmarks.stand import Array, Search, Stand
from services.arrays import as_floats
from services.latent_space.run_images import RunImages
from services.onnx_graph.module import OnnxModule
from services.storage import keys
from services.storage.catalog import Catalog
from services.triton.preprocessing import preprocess

RELEASED_EPOCHS = 15
_SAMPLES, _SPREAD, _WEIGHT, _BATCH = 64, 0.01, 0.01, 128
_LEARNING_RATE, _MOMENTUM = 1e-3, 0.9


def released(stand: Stand, search: Search, *, epochs: int) -> tuple[bytes, int]:
    """Return the corrected file, and how many components had to be labelled."""
    model, seed = Catalog(stand.store).model(search.run.config.model), search.run.config.seed
    decode = RunImages(stand.store, search.run).decode
    train = Catalog(stand.store).split(search.run.config.dataset, "train", model)
    network = OnnxModule(onnx.load_model_from_string(stand.store.read_bytes(keys.model_file(model.name, 1))))
    regions = component_images(search.failures(), decode, seed=seed)

    def prepare(images: Array) -> torch.Tensor:
        return torch.from_numpy(preprocess(images, model))

    train_as_released(network, (train.images, train.labels), regions, prepare, epochs=epochs, seed=seed)
    return network.to_onnx().SerializeToString(), len(regions[1]) // _SAMPLES


def train_as_released(
    network: nn.Module,
    original: tuple[Array, Array],
    regions: tuple[Array, Array],
    prepare: Callable[[Array], torch.Tensor],
    *,
    epochs: int,
    seed: int,
) -> None:
    """Fine-tune a network in place, on stored original images (n, h, w, c) and region images (m, c, h, w).

    `prepare` maps images in [0, 1] to the network's inputs.
    """
    (stored, stored_labels), (images, labels) = original, regions
    optimizer = torch.optim.SGD(network.parameters(), lr=_LEARNING_RATE, momentum=_MOMENTUM)
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(stored_labels))
        for begin in range(0, len(order), _BATCH):
            rows, drawn = order[begin : begin + _BATCH], random.integers(len(labels), size=_BATCH)
            batches = ((as_floats(stored[rows]), stored_labels[rows]), (images[drawn], labels[drawn]))
            of_original, of_regions = (F.cross_entropy(network(prepare(x)), torch.from_numpy(y)) for x, y in batches)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(of_original + _WEIGHT * of_regions)
            optimizer.step()


def component_images(failures: dict[str, Any], decode: Callable[[Array], Array], *, seed: int) -> tuple[Array, Array]:
    """Return images (n, c, h, w) in [0, 1] of the heavy components of failures, and their labels."""
    random = np.random.default_rng(seed)
    images, labels = [], []
    for mean, covariance, members in heavy_components(failures):
        z = random.multivariate_normal(mean, _SPREAD * covariance, size=_SAMPLES).astype(np.float32)
        images.append(decode(z))
        label = Counter(failures["true_label"][members].tolist()).most_common(1)[0][0]
        labels.append(np.full(_SAMPLES, label, np.int64))
    return np.concatenate(images), np.concatenate(labels)
