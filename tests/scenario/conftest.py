"""The classifier that all scenarios share: planted, served and searched once."""

import fcntl
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.storage.catalog import Catalog
from services.storage.safetensors import select_group
from services.triton.client import InferenceClient
from tests.conftest import ROOT, Stack
from tests.planted import CLASSES, TRUE, Planted, plant

MODEL = "planted"
# Bound of the wait for a run or a correction, generous for a busy machine.
RUN_TIMEOUT_S = 900.0
# Small enough for two cores: the spot is wide, so a rough VAE finds it. The rendering is named, because a pilot would
# train a second label model for each model; test_tutorial and test_residual have the default and the other one.
SEARCH = ("--vae-epochs", "8", "--draws", "20", "--rendering", "decoder")
# About the longest first, and many short tests at the end: a worker takes its next file when two tests are left of what
# it has, and keeps it while it is busy with them.
ORDER = (
    *("disturbances", "residual", "corrections", "releases", "whole_loop", "monitoring", "adopted", "tutorial"),
    "identification",
    *("annotations", "traces", "refusals"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files so that two workers end at about the same time."""
    places = {f"test_{name}": place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.stem, -1))


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Plant the classifier once a session; other processes wait for the first and read its result."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    file = directory / "planted.pickle"
    with (directory / "planted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            (directory / "planted").mkdir(exist_ok=True)
            file.write_bytes(pickle.dumps(plant(directory / "planted")))
    found: Planted = pickle.loads(file.read_bytes())
    return found


@pytest.fixture(scope="session")
def served(stack: Stack, planted: Planted) -> str:
    """The planted classifier, registered as a user would do it."""
    if MODEL not in {model["id"] for model in stack.defuse("models", "list")}:
        register(stack, planted, MODEL)
    return MODEL


@pytest.fixture(scope="session")
def undisturbed(stack: Stack, planted: Planted, served: str) -> Any:
    """An undisturbed run, which the disturbed ones must equal."""
    return stack.defuse(
        *("runs", "create", "--model", served, "--data", planted.data, "--name", "undisturbed"), *SEARCH, "--wait"
    )


def register(stack: Stack, planted: Planted, model: str) -> Any:
    """Register the planted classifier under a name."""
    return stack.defuse(
        *("models", "add", model, "--onnx", planted.onnx, "--classes", ",".join(CLASSES)),
        *("--mean", planted.mean, "--std", planted.std, "--range", "0,1", "--layout", "NCHW"),
    )


def corrected_spot(stack: Stack, planted: Planted, model: str, run: str) -> Any:
    """Search a registered model, give its first region, the spot, the right label, and correct it."""
    stack.defuse("runs", "create", "--model", model, "--data", planted.data, "--name", run, *SEARCH, "--wait")
    stack.defuse("annotate", run, "r1", "--label", str(TRUE))
    return stack.defuse(
        *("correct", run, "--lambda", "0.4", "--learning-rate", "1e-3", "--method", "all_weights", "--epochs", "4"),
        "--wait",
    )


def failures(stack: Stack, run: str) -> dict[str, Any]:
    """Return all failures of a run, in the order of sources, rounds and draws, whatever its shards were."""
    shards = [select_group(stack.store.read_arrays(key), "failures") for key in stack.store.keys(f"runs/{run}/results")]
    found = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    order = np.lexsort((found["draw"], found["round"], found["source"]))
    return {name: array[order] for name, array in found.items()}


def same_failures(stack: Stack, one: str, other: str) -> bool:
    """Say whether two runs found the same failures: identities equal, latents up to rounding."""
    a, b = failures(stack, one), failures(stack, other)
    identical = all(np.array_equal(a[name], b[name]) for name in ("source", "round", "draw", "predicted_label"))
    return identical and len(a["source"]) > 0 and np.allclose(a["latent"], b["latent"], atol=1e-4)


@contextmanager
def second_generator(stack: Stack) -> Iterator[list[str]]:
    """Run a second generator beside that of the stack; its log is in the list once the block has ended."""
    addresses = stack.state["addresses"]
    environment = {
        **os.environ,
        "DEFUSE_REDIS_URL": f"redis://{addresses['redis']}/0",
        "DEFUSE_TRITON_URL": addresses["triton"],
        "DEFUSE_STORE_URL": stack.store.url,
    }
    log: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "services.generator"], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as generator:
        assert generator.stderr
        assert any('"serving": true' in line for line in generator.stderr)
        try:
            yield log
        finally:  # also after a failed assertion, which would otherwise wait for it for ever
            generator.terminate()
            log.extend(generator.stderr)


def accuracy(stack: Stack, images: Any, labels: Any, version: int) -> float:
    """Return the accuracy of a version, asked through Triton."""
    client = InferenceClient(stack.state["addresses"]["triton"])
    model = Catalog(stack.store).model(f"models/{MODEL}")
    logits = client.classifier(model, version=version).classify_stored(images)
    return float((logits.argmax(axis=1) == labels).mean())


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of one's own as the current one: where contact sheets go."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
