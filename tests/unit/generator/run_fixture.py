"""The generator's stages on a planted data set: everything real but Triton and the queue.

An image is its latent, four pixels: the first two say the label, the others nothing. The classifier under test has a
weakness: the brighter the third pixel is, the more does it take anything for a bee, and the darker, the less.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from defuse.v1 import dataset_pb2, model_pb2, release_pb2, run_pb2, work_pb2

from services.gateway.runs.config import complete
from services.gateway.runs.runs import apply_event
from services.generator import preparation, worker
from services.generator.pipeline import DecoderPool
from services.generator.run_context import RunContext
from services.runtime.queue import IDENTIFY, PLAN, PREPARE
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import select_group
from services.triton.client import Classifier
from services.triton.transport import Request
from tests.unit.generator.onnx_pairs import decoder_file, encoder_file

Array = npt.NDArray[Any]
SHAPE = (1, 2, 2)
CLASSES = ("ant", "bee", "cat")
CENTRES = np.array([[0.3, 0.3], [0.7, 0.3], [0.5, 0.7]])
BEE = 1
MODEL, DATASET = "models/planted", "datasets/planted"
SPLITS = {"train": 1500, "val": 300}
HANDLERS: dict[str, Callable[[RunContext, Any, Job], work_pb2.Event]] = {
    PREPARE: preparation.prepare,
    IDENTIFY: worker.identify,
    PLAN: worker.plan,
}


def planted_images(count: int, seed: int) -> tuple[Array, Array]:
    """Plant stored images (n, 2, 2, 1) with labels (n,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    pixels = np.column_stack(
        [CENTRES[labels] + 0.06 * random.standard_normal((count, 2)), 0.5 + 0.12 * random.standard_normal((count, 2))]
    )
    return np.asarray(np.rint(255 * pixels.clip(0, 1)), np.uint8).reshape(count, 2, 2, 1), labels


def truth(images: Array) -> Array:
    """Answer logits that the label alone decides."""
    x = images.reshape(len(images), 4)[:, :2]
    return np.asarray(60 * x @ CENTRES.T - 30 * (CENTRES**2).sum(axis=1), np.float32)


def weak(images: Array) -> Array:
    """Answer the same, but for the planted weakness."""
    logits = truth(images)
    logits[:, BEE] += 12 * (images.reshape(len(images), 4)[:, 2] - 0.5)
    return logits


class Triton:
    """Stands where the inference client stands: answers with the functions that it serves, by model id."""

    def __init__(self, **functions: Callable[[Array], Array]) -> None:
        self.functions = functions

    def classifier(self, model: model_pb2.Model, *, version: int, model_id: str | None = None) -> Classifier:
        served = model_id or model.name.removeprefix("models/")
        return Classifier(self, model, version=version, model_id=served)  # type: ignore[arg-type]

    def infer(self, request: Request, images: Any, write: Callable[[Any, Any], None]) -> "Future[Array]":
        inputs = np.empty(request.shape, request.dtype)
        write(images, inputs)
        answer: Future[Array] = Future()
        answer.set_result(self.functions[request.model_id](inputs))
        return answer


class Workshop:
    """A store with the planted data and models, and benches that work on it."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.triton = Triton(planted=weak, oracle=truth)
        self.context = self.another_context()
        self.said: list[work_pb2.Event] = []
        for name in (MODEL, "models/oracle"):
            self.register(name, (2, 2, 1))
        self.bring(DATASET, {split: planted_images(count, seed) for seed, (split, count) in enumerate(SPLITS.items())})
        self.pair = run_pb2.VaeConfig(
            encoder_digest=self.upload(encoder_file(SHAPE)), decoder_digest=self.upload(decoder_file(SHAPE))
        )

    def register(self, name: str, image_shape: tuple[int, int, int]) -> None:
        """Record a model as the corrector would."""
        model = model_pb2.Model(
            name=name,
            classes=CLASSES,
            image_shape=image_shape,
            max_batch_size=64,
            input_name="image",
            output_name="logits",
            input_datatype="FP32",
            preprocessing=model_pb2.Preprocessing(layout=model_pb2.Preprocessing.LAYOUT_NCHW, low=0, high=1),
        )
        self.store.write_message(keys.model(name), model)
        self.store.write_message(f"{keys.releases(name)}/1.pb", release_pb2.Release(version=1))

    def bring(self, name: str, splits: dict[str, tuple[Array, Array]]) -> None:
        """Record a data set, images and labels by split, as the gateway would."""
        for split, (images, labels) in splits.items():
            self.store.write_arrays(keys.split(name, split), {"x": images, "y": labels})
        self.store.write_message(
            keys.dataset(name), dataset_pb2.Dataset(name=name, classes=CLASSES, label_count=len(CLASSES))
        )

    def another_context(self, *, decoders: int = 1) -> RunContext:
        """Return the bench of another worker, that has read nothing yet."""
        context = RunContext(self.store, self.triton, torch.device("cpu"))  # type: ignore[arg-type]
        context.decoders = DecoderPool(decoders)
        return context

    def upload(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.store.write_bytes(keys.file(digest), data)
        return digest

    def coarse_pair(self) -> dict[str, str]:
        """Upload a pair whose decoded images are half as bright as they should be."""
        return {
            "encoder_digest": self.upload(encoder_file(SHAPE)),
            "decoder_digest": self.upload(decoder_file(SHAPE, scale=0.5)),
        }

    def new_run(self, run_id: str, *, seed: int = 5, rendering: str = "DECODER", **sections: Any) -> run_pb2.Run:
        """Record a run as the gateway would create it; sections of its configuration are dictionaries."""
        config = run_pb2.RunConfig(model=MODEL, model_version=1, dataset=DATASET, seed=seed, vae=self.pair)
        config.search.rendering = run_pb2.SearchConfig.Rendering.Value(f"RENDERING_{rendering}")
        config = complete(config)
        for name, values in sections.items():
            for field, value in values.items():
                setattr(getattr(config, name), field, value)
        run = run_pb2.Run(name=f"runs/{run_id}", config=config)
        self.store.write_message(keys.run(run.name), run)
        return run

    def prepared_run(self, run_id: str, **sections: Any) -> run_pb2.Run:
        """Record a run that is prepared already, with what the first run of the same seed left."""
        run = self.new_run(run_id, **sections)
        for key in (keys.sources, keys.preflight):
            self.store.write_bytes(key(run.name), self.store.read_bytes(key("runs/first")))
        self.store.write_message(keys.settled_config(run.name), run.config)
        return run

    def job(self, run: run_pb2.Run) -> Job:
        return Job(run.name, self.said.append)

    def do(self, stream: str, work: Any, *, context: RunContext | None = None) -> work_pb2.Event:
        """Handle one message as a worker would."""
        return HANDLERS[stream](context or self.context, work, self.job(work.run))

    def play(self, run: run_pb2.Run, *, workers: int = 1, backwards: bool = False) -> run_pb2.Run:
        """Do the work of a run as gateway and workers would, until its failures are to be grouped; return the run."""
        benches = [self.another_context(decoders=1 + number) for number in range(workers)]
        state = run_pb2.Run(name=run.name, config=run.config, state=run_pb2.Run.STATE_PREPARING)
        waiting: list[tuple[str, Any]] = [(PREPARE, work_pb2.PrepareWork(run=run))]
        while state.state != run_pb2.Run.STATE_DISTILLING:
            stream, work = waiting.pop(-1 if backwards else 0)
            event = self.do(stream, work, context=benches[0])
            benches.append(benches.pop(0))
            waiting += apply_event(state, event)
        return state

    def found(self, run: run_pb2.Run) -> dict[str, Array]:
        """Return what was stored of a run's failures, in the order of rounds and sources."""
        record_keys = self.store.keys(f"{run.name}/results")
        return joined([select_group(self.store.read_arrays(key), "failures") for key in record_keys])


def joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
