"""Training time of an ONNX file as a torch module, against the same network written in torch."""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from services.corrector.finetune import FinetuneJob, InputMap, LabelledDataset, TrainingMix, finetune
from services.corrector.training_state import Schedule
from services.demo.classifier import DemoClassifier, to_onnx
from services.onnx_graph.module import OnnxModule

_CLASSES, _SIZE = 10, 28


def time_per_image_ratio(device: torch.device, *, turns: int, images: int, cache: Path) -> float:
    """Return the median, over interleaved turns, of the ONNX module's seconds an image over the torch network's.

    Both are the demo's classifier with its normalisation folded into the convolutions, as exporters write it.
    """
    torch.manual_seed(0)
    written = DemoClassifier((_SIZE, _SIZE, 1), _CLASSES).eval()
    file = cache / f"speed-{torch.__version__}.onnx"
    if not file.exists():
        file.write_bytes(to_onnx(written, (_SIZE, _SIZE, 1)))
    read = OnnxModule(onnx.load_model(file))
    networks = {"onnx": _training(read, device, images), "torch": _training(_folded(written), device, images)}
    for once in networks.values():
        once()
    ratios = []
    for _ in range(turns):
        seconds = {name: _seconds(once) for name, once in networks.items()}
        ratios.append(seconds["onnx"] / seconds["torch"])
    return statistics.median(ratios)


def _training(network: nn.Module, device: torch.device, count: int) -> Callable[[], None]:
    random = np.random.default_rng(0)
    images = random.random((count, 1, _SIZE, _SIZE), np.float32)
    data = LabelledDataset(fetch=lambda rows: images[rows], labels=random.integers(_CLASSES, size=count))
    nothing = LabelledDataset(fetch=lambda rows: images[rows], labels=np.zeros(0, np.int64))
    finetune_job = FinetuneJob(
        network=network,
        data=TrainingMix(original=data, regions=data),
        held_out=TrainingMix(original=nothing, regions=nothing),
        inputs=InputMap(prepare=lambda x: x),
        schedule=Schedule(epochs=1, learning_rate=1e-5, region_weight=0.5, seed=0),
    )

    def once() -> None:
        finetune(finetune_job, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return once


def _seconds(once: Callable[[], None]) -> float:
    begin = time.perf_counter()
    once()
    return time.perf_counter() - begin


def _folded(network: DemoClassifier) -> DemoClassifier:
    folded = copy.deepcopy(network)
    for position in (0, 4):
        layers = folded.features
        layers[position] = fuse_conv_bn_eval(layers[position], layers[position + 1])  # type: ignore[type-var]  # as built
        layers[position + 1] = nn.Identity()
    return folded
