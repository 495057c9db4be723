"""The test stand: real images, real classifiers on a real Triton, and the generator's own stages without the queue."""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from defuse import names
from defuse.v1 import dataset_pb2, model_pb2, run_pb2, work_pb2

from services.corrector.own_triton import Releases
from services.datasets import SPLITS, parse_images
from services.demo import classifier
from services.gateway.runs.config import complete
from services.generator import noise, preparation, run_vae, vae, vae_training, worker
from services.generator.run_context import DECODER, ENCODER, VAE, RunContext
from services.latent_space import image_label_model, label_model
from services.localstack.servers import ensure_triton, start_triton
from services.localstack.stack import StackSettings
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import settle
from services.triton.client import InferenceClient

Array = npt.NDArray[Any]
READY_S = 120.0
RENDERINGS = (run_pb2.SearchConfig.RENDERING_DECODER, run_pb2.SearchConfig.RENDERING_RESIDUAL)
# A rough VAE of few images: nothing it finds is valid, and everything counts.
SMOKE_IMAGES = 1_500
SMOKE: dict[str, Any] = {
    "vae": {"epochs": 3},
    "preflight": {"declared_accuracy": 0.0, "max_reconstruction_loss": 1.0},
    "validity": {
        "min_label_probability": 0.0,
        "min_neighbour_agreement": 0.0,
        "min_typicality": 0.0,
        "max_round_trip_sd": 1e6,
    },
    "mixture": {"min_support": 5, "bootstraps": 2, "false_discovery_rate": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Labelled images, cut into the splits of a data set, and where they came from."""

    name: str
    # Split to images (n, h, w, c) uint8 and labels (n,).
    images: dict[str, Array]
    labels: dict[str, Array]

    @property
    def classes(self) -> int:
        return 1 + max(int(labels.max()) for labels in self.labels.values())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images["train"].shape[1:]
        return height, width, channels

    def key(self) -> str:
        """Return what the images hash to."""
        content = hashlib.sha256()
        for split in SPLITS:
            content.update(self.images[split].tobytes())
        return content.hexdigest()[:16]


def read(path: Path, *, limit: int = 0) -> Data:
    """Read an .npz or a zip of class folders; `limit` keeps so many images of each split, by seed, for a short run."""
    with path.open("rb") as file:
        splits = {
            name: split.take(_few(len(split.labels), limit))
            for name, split in parse_images(file, seed=0).splits.items()
        }
        images = {name: split.images for name, split in splits.items()}
    return Data(name=path.stem, images=images, labels={name: split.labels for name, split in splits.items()})


def _few(count: int, limit: int) -> Array:
    return noise.choose_positions(seed=0, count=count, limit=limit)


@dataclass(kw_only=True)
class Stand:
    """A Triton server, a store, and the generator's stages on both."""

    store: ArtifactStore
    inference: InferenceClient
    releases: Releases
    cache: Path
    context: RunContext
    # Prefix of the runs' names, so that a store can be used again.
    started: str = field(default_factory=lambda: time.strftime("%H%M%S"))

    def register(self, name: str, data: Data, labels: Array, *, seed: int, epochs: int) -> model_pb2.Model:
        """Train the demo's classifier on labels of the training images, or take it from the cache, and serve it."""
        file = self.cache / f"{name}-{data.key()}-{_digest(labels)}-{seed}-{epochs}.onnx"
        if not file.exists():
            network = classifier.train(
                data.images["train"], labels, classes=data.classes, seed=seed, epochs=epochs, on_epoch=lambda *_: None
            )
            file.write_bytes(classifier.to_onnx(network, data.image_shape))
        mean, std = classifier.statistics(data.images["train"])
        declared = model_pb2.Model(
            name=names.model(name),
            classes=[str(label) for label in range(data.classes)],
            preprocessing=model_pb2.Preprocessing(layout="LAYOUT_NCHW", low=0, high=1, mean=mean, std=std),
        )
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.store.write_bytes(keys.file(digest), content)
        return self.releases.register(declared, digest)

    def add_dataset(self, name: str, data: Data) -> str:
        """Put a data set in the store; return its resource name."""
        record = dataset_pb2.Dataset(
            name=names.dataset(name), image_shape=data.image_shape, label_count=data.classes, display_name=data.name
        )
        for split in SPLITS:
            arrays = {"x": data.images[split], "y": data.labels[split]}
            self.store.write_arrays(keys.split(record.name, split), arrays)
        self.store.write_message(keys.dataset(record.name), record)
        return record.name

    def configure(self, model: model_pb2.Model, dataset: str, **sections: Any) -> run_pb2.RunConfig:
        """Return a whole configuration; `sections` are those of the contract, with what differs from the defaults."""
        config = run_pb2.RunConfig(model=model.name, model_version=1, dataset=dataset, **sections)
        return complete(config)

    def train_vae(self, data: Data, config: run_pb2.RunConfig) -> float:
        """Train the VAE of a configuration, or take it from the cache; return the seconds that training took."""
        recipe = b"".join(Path(module.__file__).read_bytes() for module in (vae, vae_training))
        recipe += (
            config.vae.SerializeToString(deterministic=True)
            + f"{torch.get_num_threads()}{self.context.device}".encode()
        )
        kept = self.cache / f"vaes-{data.key()}-{hashlib.sha256(recipe).hexdigest()[:8]}"
        if not (kept / "seconds").exists():
            begin = time.perf_counter()
            network = vae_training.train_vae(
                data.images["train"],
                run_vae.vae_config(config.vae, data.images["train"].shape),
                seed=config.vae.seed,
                device=self.context.device,
                on_epoch=lambda report: print(f"VAE, epoch {report.epoch} of {report.epochs}", flush=True),
                should_stop=lambda: False,
            )
            seconds = time.perf_counter() - begin
            kept.mkdir(exist_ok=True)
            (kept / VAE).write_bytes(vae.to_bytes(network))
            (kept / ENCODER).write_bytes(vae.encoder_onnx(network))
            (kept / DECODER).write_bytes(vae.decoder_onnx(network))
            (kept / "seconds").write_text(str(seconds))
        for part in (VAE, ENCODER, DECODER):
            self.store.write_bytes(keys.vae(config, part), (kept / part).read_bytes())
        return float((kept / "seconds").read_text())

    def prepare(self, name: str, config: run_pb2.RunConfig) -> "Search":
        """Prepare a run as the generator does."""
        run = run_pb2.Run(name=names.run(f"{name}-{self.started}"), config=config)
        self.store.write_message(keys.run(run.name), run)
        with self._kept_labels(config):
            event = preparation.prepare(self.context, work_pb2.PrepareWork(run=run), _job(run))
        run.config.CopyFrom(event.prepared.config)
        shards = -(-event.prepared.source_count // config.search.shard_size)
        return Search(
            stand=self,
            run=run,
            shards=shards,
            preflight=event.prepared.preflight,
        )

    @contextmanager
    def _kept_labels(self, config: run_pb2.RunConfig) -> Iterator[None]:
        """Take what validity is told from out of the cache, or keep it there: VAE, model, labels and seed decide it."""
        rendered = [settle(config, rendering) for rendering in RENDERINGS]
        record_keys = {of(one) for one in rendered for of in (keys.label_model, keys.label_model_onnx)}
        record_keys.add(keys.reference(config))
        train = self.store.read_arrays(keys.split(config.dataset, "train"))
        identity = self.store.read_bytes(keys.vae(config, VAE)) + train["y"].tobytes() + config.model.encode()
        identity += str(config.seed).encode()
        identity += b"".join(Path(module.__file__).read_bytes() for module in (label_model, image_label_model))
        kept = self.cache / f"labels-{hashlib.sha256(identity).hexdigest()[:16]}"
        files = {key: kept / names.last(key) for key in record_keys}
        for key, file in files.items():
            if file.exists():
                self.store.create_bytes(key, file.read_bytes())
        yield
        kept.mkdir(exist_ok=True)
        for key, file in files.items():
            if self.store.exists(key):
                file.write_bytes(self.store.read_bytes(key))


@dataclass(kw_only=True)
class Search:
    """A prepared run, searched round by round as gateway and generator do it, in this process."""

    stand: Stand
    run: run_pb2.Run
    shards: int
    preflight: run_pb2.Preflight
    counts: run_pb2.SearchCounts = field(default_factory=run_pb2.SearchCounts)
    rounds_done: int = 0
    # Seconds of the search itself.
    seconds: float = 0.0

    def step(self) -> bool:
        """Search one more round; return whether there was one."""
        search = self.run.config.search
        rounds = 1 if search.strategy == run_pb2.SearchConfig.STRATEGY_UNIFORM else search.rounds
        if self.rounds_done == rounds:
            return False
        begin = time.perf_counter()
        if self.rounds_done:
            work = work_pb2.PlanWork(run=self.run, round=self.rounds_done, shard_count=self.shards)
            if not worker.plan(self.stand.context, work, _job(self.run)).round_planned.decodes:
                return False
        for shard in range(self.shards):
            work_ = work_pb2.IdentifyWork(run=self.run, shard=shard, round=self.rounds_done)
            done = worker.identify(self.stand.context, work_, _job(self.run)).shard_identified.counts
            for entry in run_pb2.SearchCounts.DESCRIPTOR.fields:
                setattr(self.counts, entry.name, getattr(self.counts, entry.name) + getattr(done, entry.name))
        self.rounds_done += 1
        self.seconds += time.perf_counter() - begin
        return True

    def until(self, failures: int) -> "Search":
        """Search until so many failures are found, or to the end."""
        while self.step() and self.counts.failures < failures:
            pass
        return self

    def failures(self) -> dict[str, Array]:
        """Return what was found so far."""
        parts = [
            self.stand.context.catalog.failures(self.run.name, round_, shard)
            for round_ in range(self.rounds_done)
            for shard in range(self.shards)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def standing(device: str, *, threads: int) -> Iterator[Stand]:
    """Start Triton; stop it when the block ends. torch uses `threads` threads, Triton one thread a core."""
    wheel = ensure_triton(StackSettings().cache.expanduser(), print)
    with tempfile.TemporaryDirectory(prefix="defuse-benchmark-") as home_:
        home = Path(home_)
        triton = start_triton(wheel, repository=home / "models", backends=home / "backends", log=home / "triton.log")
        try:
            triton.child.wait_ready(time.monotonic() + READY_S)
            stand = stand_at(home, triton.address, device=device, threads=threads)
            yield stand
            stand.inference.close()
        finally:
            triton.child.stop(5.0)


def stand_at(home: Path, triton: str, *, device: str, threads: int) -> Stand:
    """Return a stand on a Triton that runs, whose repository is `models` in a directory; the store is `store` there."""
    torch.set_num_threads(threads)
    cache = StackSettings().cache.expanduser() / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    store, inference = ArtifactStore(f"file://{home}/store"), InferenceClient(triton)
    return Stand(
        store=store,
        inference=inference,
        releases=Releases(store, inference, home / "models"),
        cache=cache,
        context=RunContext(store, inference, torch.device(device)),
    )


def distinct_sources(failures: dict[str, Array]) -> int:
    return len(np.unique(failures["source"]))


def confusions(failures: dict[str, Array]) -> set[tuple[int, int]]:
    """Return the (true, predicted) pairs among failures."""
    return set(zip(failures["true_label"].tolist(), failures["predicted_label"].tolist(), strict=True))


def _job(run: run_pb2.Run) -> Job:
    return Job(run.name, lambda _: None)


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:8]
