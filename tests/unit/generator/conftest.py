"""The fixture of the stages' tests, in which the run `runs/first` is prepared."""

from collections.abc import Iterator

import pytest
import torch
from defuse.v1 import work_pb2

from services.runtime.queue import PREPARE
from services.storage.artifacts import ArtifactStore
from tests.unit.generator.run_fixture import Workshop


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, which wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A store of which nothing is changed once it is there: every test has runs of its own."""
    workshop = Workshop(ArtifactStore(f"file://{tmp_path_factory.mktemp('workshop')}"))
    workshop.do(PREPARE, work_pb2.PrepareWork(run=workshop.new_run("first")))
    return workshop
