"""A tiny world that a correction can be made in: a deployed network, a data set, a VAE, two labelled regions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from defuse.v1 import correction_pb2, dataset_pb2, model_pb2, release_pb2, run_pb2, work_pb2
from defuse.v1.correction_pb2 import CorrectionConfig, Training
from torch import nn

from services.corrector.training import Trainer, train
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import join_groups
from tests.unit.generator.onnx_pairs import SHAPE, decoder_file

Array = npt.NDArray[Any]
MODEL, RUN, CORRECTION, DATASET = "models/tiny", "runs/first", "runs/first/corrections/c1", "datasets/tiny"
CLASSES = ("left", "middle", "right")
DIM, HIDDEN = 6, 8
ROWS = {"train": 200, "val": 120, "test": 150}
REGIONS = ("runs/first/regions/r1", "runs/first/regions/r2")


class Network(nn.Module):
    """Flatten and two layers: the deployed network, and the factory's."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(torch.relu(self.wide(images.flatten(1))))
        return logits


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def deployed_file(operator: str = "Relu") -> bytes:
    """Return the network as an ONNX file; another operator in its midst makes it one that cannot be trained."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "com.acme" : 1]>'
        "g (float[n,1,2,3] images) => (float[n,3] logits) {"
        "flat = Flatten(images) a = Gemm<transB = 1>(flat, wide, wide_bias)"
        f"b = {operator}(a) logits = Gemm<transB = 1>(b, last, last_bias) }}"
    )
    for name, weight in network().named_parameters():
        array = weight.detach().numpy()
        key = name.removesuffix(".weight").replace(".bias", "_bias")
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    return bytes(model.SerializeToString())


def label_model_file() -> bytes:
    """Return what believes that a latent is of the class whose column is brightest."""
    columns = np.tile(np.eye(3, dtype=np.float32), 2).T * 40
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n,6] z) => (float[n,3] probabilities) '
        "{ a = MatMul(z, columns) probabilities = Softmax(a) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(columns, "columns"))
    return bytes(model.SerializeToString())


def brightest(latent: Array) -> Array:
    """Return the class of latents (n, 6), which are the pixels themselves."""
    return np.asarray(latent.reshape(-1, 2, 3).sum(axis=1).argmax(axis=1))


@dataclass(kw_only=True)
class World:
    """A store with everything that a correction reads."""

    store: ArtifactStore
    notes: list[str] = field(default_factory=list)

    def correction(self, *wanted: Training, **config: Any) -> correction_pb2.Correction:
        """Return a correction that tries these trainings."""
        common = {"images_per_region": 32, "epochs": 3, "seed": 1, "margin": 0.01, **config}
        regions = [
            correction_pb2.LabelledRegion(region=name, label=label)
            for name, label in zip(REGIONS, CLASSES, strict=False)
        ]
        return correction_pb2.Correction(
            name=CORRECTION,
            config=CorrectionConfig(**common),
            model=MODEL,
            base_version=1,
            regions=regions,
            trainings=wanted,
        )

    def trained(
        self,
        correction: correction_pb2.Correction,
        position: int = 0,
        *,
        factories: Sequence[str] = (),
        stop: Callable[[str], bool] = lambda _: False,
    ) -> Training:
        """Make a training as the corrector does; `stop(note)` kills it."""

        def publish(event: work_pb2.Event) -> None:
            self.notes.append(event.progress.note)
            if stop(event.progress.note):
                raise KeyboardInterrupt

        trainer = Trainer(store=self.store, device=torch.device("cpu"), factories=factories)
        work = work_pb2.TrainWork(correction=correction, training=position)
        event = train(trainer, work, Job(correction.name, publish))
        assert event.trained.position == position
        return event.trained.training

    def weights(self, position: int = 0, number: int = 0) -> dict[str, Array]:
        """Return the weights of a point by the names of the deployed file."""
        return weights_of(self.store.read_bytes(keys.onnx_file(keys.point(CORRECTION, position, number))))


def weights_of(file: bytes) -> dict[str, Array]:
    graph = onnx.load_model_from_string(file).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def build(store: ArtifactStore, *, file: bytes | None = None) -> World:
    """Fill a store."""
    random = np.random.default_rng(0)
    preprocessing = model_pb2.Preprocessing(layout="LAYOUT_NCHW", low=0, high=1)
    model = model_pb2.Model(
        name=MODEL,
        classes=CLASSES,
        preprocessing=preprocessing,
        output="OUTPUT_LOGITS",
        image_shape=[2, 3, 1],
        input_name="images",
        input_datatype="FP32",
        output_name="logits",
        max_batch_size=16,
    )
    store.write_message(keys.model(MODEL), model)
    store.write_message(f"{keys.releases(MODEL)}/1.pb", release_pb2.Release(model=MODEL, version=1))
    store.write_bytes(keys.model_file(MODEL, 1), file or deployed_file())
    store.write_message(keys.model_version(MODEL, 1), model_pb2.ModelVersion(name=f"{MODEL}/versions/1"))
    store.write_message(keys.dataset(DATASET), dataset_pb2.Dataset(name=DATASET, label_count=3, image_shape=[2, 3, 1]))
    for split, rows in ROWS.items():
        pixels = random.integers(256, size=(rows, DIM), dtype=np.uint8)
        store.write_arrays(keys.split(DATASET, split), {"x": pixels.reshape(-1, 2, 3, 1), "y": brightest(pixels)})
    config = run_pb2.RunConfig(model=MODEL, dataset=DATASET, validity={"min_label_probability": 0.9})
    store.write_message(keys.run(RUN), run_pb2.Run(name=RUN, config=config))
    store.write_bytes(keys.vae(config, "decoder.onnx"), decoder_file(SHAPE))
    store.write_bytes(keys.label_model_onnx(config), label_model_file())
    parts = [_region(store, name, column, random) for column, name in enumerate(REGIONS)]
    failures = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    store.write_arrays(keys.shard_result(RUN, 0, 0), join_groups(failures=failures))
    return World(store=store)


def _region(store: ArtifactStore, name: str, column: int, random: np.random.Generator) -> dict[str, Array]:
    """Store a region of one class around a corner of the pixels; return its failures."""
    centre = np.full((2, 3), 0.3)
    centre[:, column] = 0.8
    latent = (centre.reshape(-1) + 0.05 * random.standard_normal((60, DIM))).astype(np.float32)
    source = random.choice(ROWS["val"], size=60, replace=False)
    arrays = {
        "mean": latent.mean(axis=0),
        "covariance": np.cov(latent.T),
        "latent": latent[:40],
        "source": source[:40],
        "held_out_latent": latent[40:],
        "held_out_source": source[40:],
        "exemplars": np.zeros((2, 2, 3, 1), np.uint8),
    }
    store.write_arrays(keys.region_arrays(name), arrays)
    return {
        "latent": latent,
        "source": source,
        "true_label": np.full(60, column, np.int32),
        "held_out": (np.arange(60) >= 40).astype(np.uint8),
    }
