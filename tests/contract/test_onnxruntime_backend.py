"""The entries of config.pbtxt that the embedded onnxruntime backend reads, on the real Triton."""

from pathlib import Path

import pytest
from defuse.errors import NotReady
from google.protobuf import text_format

from services.corrector.triton_repository import classifier_config
from services.triton.client import InferenceClient
from tests.restartable_triton import Served


def load_with_threads(served: Served, name: str, count: str) -> None:
    """Load the classifier under a name, with one instance, as if an operator had written the entry."""
    served.repository.add_version(name, 1, (served.entry("tiny") / "1" / "model.onnx").read_bytes())
    config = classifier_config(served.model, name, [1])
    config.parameters["intra_op_thread_count"].string_value = count
    (served.entry(name) / "config.pbtxt").write_text(text_format.MessageToString(config))
    InferenceClient(served.address).load(name)


def threads(served: Served, name: str) -> int:
    """Return how many threads the process has in which a classifier runs."""
    mine = str(served.entry(name)).encode()
    processes = [path for path in Path("/proc").iterdir() if path.name.isdecimal()]
    [stub] = [path for path in processes if mine in read(path / "cmdline")]
    return len(list((stub / "task").iterdir()))


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process ended
        return b""


def test_the_number_of_threads_is_read(served: Served) -> None:
    """`intra_op_thread_count` says how many threads run one request: three are two more than one."""
    for count in ("1", "3"):
        load_with_threads(served, f"threads{count}", count)
    assert threads(served, "threads3") == threads(served, "threads1") + 2


def test_a_number_of_threads_that_is_none(served: Served) -> None:
    """A non-numeric parameter is rejected when the model is loaded, by name and value."""
    with pytest.raises(NotReady, match="intra_op_thread_count is 'many'"):
        load_with_threads(served, "unclear", "many")
