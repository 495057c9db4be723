import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.storage.artifacts import ArtifactStore
from tests.unit.distiller.mixture.clouds import planted

REPOSITORY = Path(__file__).parents[3]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """A store that holds six clouds, and class ids beside them."""
    found = ArtifactStore(f"file://{tmp_path_factory.mktemp('store')}")
    x, label = planted(clouds=6, dim=4, points=1501, apart=4.0)
    found.write_arrays("runs/large/points", {"latent": x.astype(np.float32), "true_label": label % 2})
    return found


def fit(store: ArtifactStore, out: str, *launcher: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "services.distiller.fit", store.url, "runs/large/points", out]
    command += ["--category", "true_label", "--components", "25", *more]
    return subprocess.run(command, cwd=REPOSITORY, timeout=120, capture_output=True, text=True, check=False)


def test_torchrun_writes_what_one_process_writes(store: ArtifactStore) -> None:
    """Two processes with half of the rows each leave the mixture of one in the store, and it is the planted one."""
    for out, launcher in (("one", ()), ("two", TORCHRUN)):
        done = fit(store, out, *launcher)
        assert done.returncode == 0, done.stderr
    one, two = store.read_arrays("one"), store.read_arrays("two")
    assert (one["counts"] > 50).sum() == 6
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-9, atol=1e-9)


def test_an_array_that_is_not_there_is_named(store: ArtifactStore) -> None:
    """The refusal says which arrays there are."""
    done = fit(store, "none", more=("--array", "z"))
    assert done.returncode != 0
    assert done.stderr == "fit: runs/large/points has no array 'z'; it has: latent, true_label\n"
