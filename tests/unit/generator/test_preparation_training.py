"""The preparation of runs whose VAE is trained: once for all that share it, and from where a dead worker left it."""

from typing import Any

import numpy as np
import pytest
from defuse.errors import Cancelled, NotFound
from defuse.v1 import run_pb2, work_pb2

from services.generator import run_vae
from services.generator.codec import onnx_codec
from services.generator.vae import to_bytes
from services.latent_space import label_model
from services.onnx_graph.onnx_files import onnx_function
from services.runtime.queue import PREPARE
from services.runtime.worker import Job
from services.storage import keys
from tests.unit.generator.bars import bars
from tests.unit.generator.run_fixture import Array, Workshop

MODEL, DATASET = "models/bars", "datasets/bars"
BRIGHT = 45 / 255


def by_brightness(images: Array) -> Array:
    """Read bars as dark or bright, and none as the third class."""
    mean = images.mean(axis=(1, 2, 3))
    return np.stack([BRIGHT - mean, mean - BRIGHT, np.full_like(mean, -1)], axis=1)


@pytest.fixture(scope="module")
def barred(workshop: Workshop) -> Workshop:
    """The workshop with a data set of bars."""
    workshop.triton.functions["bars"] = by_brightness
    workshop.register(MODEL, (12, 10, 1))
    images = {"train": bars(70), "val": bars(30, seed=1)}
    workshop.bring(DATASET, {split: (x, (x.mean(axis=(1, 2, 3)) > 45).astype(int)) for split, x in images.items()})
    return workshop


def new_run(workshop: Workshop, run_id: str, **vae: Any) -> run_pb2.Run:
    run = workshop.new_run(run_id, preflight={"max_reconstruction_loss": 1.0})
    run.config.model, run.config.dataset = MODEL, DATASET
    run.config.vae.CopyFrom(run_pb2.VaeConfig(**{"latent_dim": 4, "epochs": 3, **vae}))
    return run


def trained(workshop: Workshop, run: run_pb2.Run, job: Job | None = None) -> bytes:
    """Train a run's VAE as a worker would; return its file."""
    train = workshop.context.images(run, "train")
    return to_bytes(run_vae._train_vae(workshop.context, run, train, job or workshop.job(run)))


def dying_job(workshop: Workshop, run: run_pb2.Run, epochs: int) -> Job:
    """Return a job that is over after so many epochs."""
    reports = []

    def publish(event: work_pb2.Event) -> None:
        reports.append(event)
        if len(reports) == epochs:
            job.cancel()

    job = Job(run.name, publish)
    return job


def checkpoints(workshop: Workshop, run: run_pb2.Run) -> list[str]:
    return workshop.store.keys(keys.vae(run.config, "checkpoints"))


def interrupted(workshop: Workshop, run: run_pb2.Run, epochs: int) -> bytes:
    """Train a run's VAE to the end, then again until a worker dies; return the file of the end."""
    whole = trained(workshop, run)
    for key in checkpoints(workshop, run):
        workshop.store.remove(key)
    with pytest.raises(Cancelled, match="was cancelled"):
        trained(workshop, run, dying_job(workshop, run, epochs))
    return whole


@pytest.mark.parametrize("epochs", [1, 2])
def test_training_goes_on_where_a_worker_left_it(barred: Workshop, epochs: int) -> None:
    """A worker that takes over goes on behind the last epoch, to the VAE of one that was never interrupted."""
    run = new_run(barred, f"taken-over-{epochs}", seed=epochs)
    whole = interrupted(barred, run, epochs)
    assert [key.rsplit("/", 1)[-1] for key in checkpoints(barred, run)] == [f"{epochs:05d}"]
    before = len(barred.said)
    assert trained(barred, run) == whole
    notes = [event.progress.note for event in barred.said[before:]]
    assert len(notes) == 3 - epochs
    assert notes[0].startswith(f"training the VAE, epoch {epochs + 1} of 3")


def test_a_checkpoint_that_was_never_finished_is_no_checkpoint(barred: Workshop) -> None:
    """A partial checkpoint of a killed worker neither stops the next one nor is resumed."""
    run = new_run(barred, "half", seed=20)
    whole = interrupted(barred, run, 1)
    half = f"{keys.vae(run.config, 'checkpoints')}/00002.0123456789abcdef.partial"
    barred.store.write_bytes(half, b"half a checkpoint")
    assert trained(barred, run) == whole


def test_a_checkpoint_that_somebody_else_removes(barred: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another run that trains the same VAE is faster, this one still gets there."""
    run = new_run(barred, "slower", seed=21)
    whole, read = interrupted(barred, run, 1), barred.store.read_bytes

    def after_the_other(key: str) -> bytes:
        if "checkpoints" in key:
            barred.store.remove(key)
        return read(key)

    monkeypatch.setattr(barred.store, "read_bytes", after_the_other)
    assert trained(barred, run) == whole


@pytest.fixture(scope="module")
def prepared(barred: Workshop) -> tuple[run_pb2.Run, work_pb2.Prepared]:
    """A run that trained its VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_model, "_STEPS", 2)
        run = new_run(barred, "trains")
        return run, barred.do(PREPARE, work_pb2.PrepareWork(run=run)).prepared


def test_a_trained_vae_is_there_for_everybody(
    barred: Workshop, prepared: tuple[run_pb2.Run, work_pb2.Prepared]
) -> None:
    """After its preparation a run has sources, weights for the search, and the same as two ONNX files for others."""
    run, done = prepared
    assert done.source_count == 30
    store, pair = barred.store, barred.context.codec(run.config)
    encoder, decoder = (store.read_bytes(keys.vae(run.config, part)) for part in ("encoder.onnx", "decoder.onnx"))
    exported = onnx_codec(onnx_function(encoder), onnx_function(decoder), (1, 12, 10))
    images = bars(5, seed=3)
    for got, want in zip(exported.encode_stored(images), pair.encode_stored(images), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    mu, _ = pair.encode_stored(images)
    np.testing.assert_allclose(exported.decode(mu), pair.decode(mu), atol=1e-4)


def test_runs_that_share_a_vae_train_it_once(
    barred: Workshop, prepared: tuple[run_pb2.Run, work_pb2.Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run on the same data with the same VAE takes what is there."""
    monkeypatch.setattr(label_model, "_STEPS", 2)
    before = len(barred.said)
    run = new_run(barred, "shares")
    run.config.seed = 99
    barred.do(PREPARE, work_pb2.PrepareWork(run=run))
    assert keys.vae(run.config, "") == keys.vae(prepared[0].config, "")
    assert not [event for event in barred.said[before:] if "training the VAE" in event.progress.note]


def test_a_vae_whose_export_was_lost_is_exported_again(
    barred: Workshop, prepared: tuple[run_pb2.Run, work_pb2.Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that died between training and export leaves the weights, of which the next makes the files."""
    monkeypatch.setattr(label_model, "_STEPS", 2)
    run, _ = prepared
    key = keys.vae(run.config, "decoder.onnx")
    barred.store.remove(key)
    with pytest.raises(NotFound):
        barred.store.read_bytes(key)
    before = len(barred.said)
    barred.do(PREPARE, work_pb2.PrepareWork(run=new_run(barred, "exports")))
    assert barred.store.exists(key)
    assert not [event for event in barred.said[before:] if "training the VAE" in event.progress.note]
