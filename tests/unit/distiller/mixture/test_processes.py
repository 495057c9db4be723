import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.distiller.mixture import DirichletProcessMixture
from tests.unit.distiller.mixture.clouds import planted

REPOSITORY = Path(__file__).parents[4]


@pytest.mark.parametrize("processes", [2])
def test_several_processes_find_what_one_finds(tmp_path: Path, processes: int) -> None:
    """Under torchrun each process holds a part of the points, and the fit is that of one process, moves and all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.unit.distiller.mixture.worker", str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=120, capture_output=True)
    found = np.load(tmp_path / "found.npz")
    x, label = planted(clouds=6, dim=4, points=1501, apart=4.0)
    alone = DirichletProcessMixture(n_components=25, threads=1, blocks=1).fit(x, categories=[label % 2])
    assert float(found["bound"]) == pytest.approx(alone.lower_bound_, rel=1e-9)
    np.testing.assert_allclose(found["means"], alone.means_, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["counts"], alone.counts_, rtol=1e-9, atol=1e-9)
