from collections.abc import Callable
from pathlib import Path

import pytest
from defuse.errors import InvalidInput, NotReady, StoreFull
from defuse.v1 import model_pb2
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from services.corrector.release_history import candidate_id, check_model_id
from services.corrector.triton_repository import TritonRepository, classifier_config
from tests.unit.conftest import RememberingTriton

Declare = Callable[..., model_pb2.Model]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def repository(root: Path, triton: RememberingTriton) -> TritonRepository:
    return TritonRepository(root, triton)


@pytest.fixture
def model(declared: Declare) -> model_pb2.Model:
    signature = model_pb2.Model(
        image_shape=[8, 10, 3], max_batch_size=64, input_name="image", output_name="logits", input_datatype="FP32"
    )
    signature.MergeFrom(declared())
    return signature


def test_config_of_a_model_with_any_batch_size(model: model_pb2.Model) -> None:
    """Triton is told the input without the batch, the classes, the versions in order, and to batch requests."""
    config = classifier_config(model, "tiny", [3, 2])
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 64)
    assert list(config.version_policy.specific.versions) == [2, 3]
    [entry], [answer] = config.input, config.output
    assert (entry.name, entry.data_type, list(entry.dims)) == ("image", model_config_pb2.TYPE_FP32, [3, 8, 10])
    assert (answer.name, answer.data_type, list(answer.dims)) == ("logits", model_config_pb2.TYPE_FP32, [3])
    assert config.HasField("dynamic_batching")
    # Asked for before callers are: the smallest and the largest batch.
    assert [entry.batch_size for entry in config.model_warmup] == [1, 64]
    assert list(config.model_warmup[0].inputs["image"].dims) == [3, 8, 10]


def test_config_of_a_model_with_a_fixed_batch_size(model: model_pb2.Model) -> None:
    """A fixed batch is a dimension of the tensors, and nothing is batched."""
    model.fixed_batch_size, model.max_batch_size, model.input_datatype = 4, 0, "UINT8"
    model.preprocessing.layout = model_pb2.Preprocessing.LAYOUT_NHWC
    config = classifier_config(model, "tiny", [1])
    assert config.max_batch_size == 0
    assert (config.input[0].data_type, list(config.input[0].dims)) == (model_config_pb2.TYPE_UINT8, [4, 8, 10, 3])
    assert list(config.output[0].dims) == [4, 3]
    assert not config.HasField("dynamic_batching")
    assert [(entry.batch_size, list(entry.inputs["image"].dims)) for entry in config.model_warmup] == [
        (0, [4, 8, 10, 3])
    ]


def test_a_version_is_written_whole_and_never_changed(repository: TritonRepository, root: Path) -> None:
    """A version that is there is left alone; nothing temporary stays."""
    repository.add_version("tiny", 1, b"first")
    repository.add_version("tiny", 1, b"second")
    repository.add_version("tiny", 10, b"tenth")
    assert (root / "tiny/1/model.onnx").read_bytes() == b"first"
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["1", "10"]
    assert repository.versions("tiny") == [1, 10]


def test_what_is_half_written_is_no_version(repository: TritonRepository, root: Path) -> None:
    """A dead process's temporary directory is not a version, and does not stand in the way."""
    (root / "tiny/.partial-1-abcdef00").mkdir(parents=True)
    assert repository.versions("tiny") == []
    repository.add_version("tiny", 1, b"whole")
    assert repository.versions("tiny") == [1]


def test_no_versions_of_an_unknown_model(repository: TritonRepository) -> None:
    """A model without a directory has no versions."""
    assert repository.versions("unknown") == []


def test_a_version_that_cannot_be_written_leaves_nothing(repository: TritonRepository, root: Path) -> None:
    """A failed write names the place and the cause, and leaves nothing that looks like a version."""
    root.write_text("a file where the directory should be")
    with pytest.raises(StoreFull, match=f"{root}.*Not a directory"):
        repository.add_version("tiny", 1, b"file")
    assert repository.versions("tiny") == []


def test_serving_writes_the_config_then_loads(
    repository: TritonRepository, root: Path, triton: RememberingTriton, model: model_pb2.Model
) -> None:
    """Triton finds the versions in the config when it is asked to load, and the config is replaced whole."""
    repository.add_version("tiny", 1, b"first")
    repository.serve(model, "tiny", [1])
    repository.serve(model, "tiny", [1, 2])
    assert triton.calls == [("load", "tiny")] * 2
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["1", "config.pbtxt"]
    written = text_format.Parse((root / "tiny/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert written == classifier_config(model, "tiny", [1, 2])


def test_what_triton_refuses_is_said(
    repository: TritonRepository, triton: RememberingTriton, model: model_pb2.Model
) -> None:
    """Triton's refusal reaches the caller."""
    repository.add_version("tiny", 1, b"first")
    triton.refuses = True
    with pytest.raises(NotReady):
        repository.serve(model, "tiny", [1])


def test_withdrawing_unloads_and_removes(
    repository: TritonRepository, root: Path, triton: RememberingTriton, model: model_pb2.Model
) -> None:
    """A withdrawn model is neither served nor in the repository; once more does no harm."""
    repository.add_version("tiny", 1, b"first")
    repository.serve(model, "tiny", [1])
    repository.withdraw("tiny")
    assert triton.calls[-1] == ("unload", "tiny")
    assert not (root / "tiny").exists()
    repository.withdraw("tiny")


def test_candidates_have_names_of_their_own() -> None:
    """A model cannot be called what another one's candidate is called."""
    with pytest.raises(InvalidInput, match="tiny-candidate"):
        check_model_id(candidate_id("tiny"))
    check_model_id("candidate-tiny")
