"""Bad input: each a clear error that names the value, through the public client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defuse import AlreadyExists, Client, Conflict, DefuseError, InvalidInput, NotFound, NotReady
from PIL import Image

from tests.conftest import Stack
from tests.planted import CLASSES, Planted
from tests.scenario.conftest import RUN_TIMEOUT_S, SEARCH


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client


def _npz(path: Path, shape: tuple[int, ...] = (40, 28, 28), labels: Any = None, **more: Any) -> Path:
    images = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(len(images)) % 10 if labels is None else labels, **more)
    return path


def test_an_onnx_file_that_is_none(client: Client) -> None:
    """Bytes that are no graph are refused, with their number."""
    with pytest.raises(InvalidInput, match="no ONNX model"):
        client.add_model("no-onnx", b"certainly not a graph", CLASSES)


def test_a_wrong_class_count(client: Client, planted: Planted) -> None:
    """Declaring another number of classes than the graph has is refused, with both numbers."""
    with pytest.raises(InvalidInput, match="10") as refused:
        client.add_model("three", planted.onnx, ["a", "b", "c"])
    assert refused.value.reason == "CLASS_COUNT_MISMATCH"


def test_a_name_in_use(client: Client, planted: Planted, served: str) -> None:
    """A model is registered once."""
    with pytest.raises(AlreadyExists, match=served):
        client.add_model(served, planted.onnx, CLASSES)


def test_images_of_another_shape(client: Client, served: str, tmp_path: Path) -> None:
    """A run on images that the model does not take is refused, with both shapes."""
    dataset = client.add_dataset(_npz(tmp_path / "wide.npz", (40, 32, 32)))
    with pytest.raises(InvalidInput, match=r"28x28x1.*32x32x1"):
        client.create_run("wrong-shape", model=served, dataset=dataset.id)


def test_labels_outside_the_classes(client: Client, served: str, tmp_path: Path) -> None:
    """Labels that the model does not have are named."""
    dataset = client.add_dataset(_npz(tmp_path / "labels.npz", labels=np.arange(40) % 12))
    with pytest.raises(InvalidInput, match="10, 11"):
        client.create_run("wrong-labels", model=served, dataset=dataset.id)


def test_images_of_mixed_sizes(client: Client, tmp_path: Path) -> None:
    """Two sizes in one folder are refused, with both files."""
    for name, side in (("a/one.png", 28), ("b/two.png", 30)):
        (tmp_path / "mixed" / name).parent.mkdir(parents=True)
        Image.new("L", (side, side)).save(tmp_path / "mixed" / name)
    with pytest.raises(InvalidInput, match=r"two\.png.*30x30.*one\.png.*28x28"):
        client.add_dataset(tmp_path / "mixed")


def test_an_empty_split(client: Client, tmp_path: Path) -> None:
    """A split without images is refused by name."""
    empty = {"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, np.int64)}
    with pytest.raises(InvalidInput, match="'test' has no images"):
        client.add_dataset(_npz(tmp_path / "empty.npz", **empty))


def test_what_does_not_exist(client: Client, undisturbed: Any) -> None:
    """Unknown runs, regions, models and corrections are named; a region's error says which ones there are."""
    for call in (
        lambda: client.run("nowhere"),
        lambda: client.model("nowhere"),
        lambda: client.correction(undisturbed["id"], "c99"),
    ):
        with pytest.raises(NotFound, match=r"nowhere|c99"):
            call()
    with pytest.raises(NotFound, match="no region 'r999'; it has: r1"):
        client.annotate(undisturbed["id"], "r999", label="7")


def test_a_label_that_the_model_does_not_have(client: Client, undisturbed: Any) -> None:
    """An annotation must be one of the classes; the error lists them."""
    with pytest.raises(InvalidInput, match=r"'seven' is no class.*0, 1, 2"):
        client.annotate(undisturbed["id"], "r1", label="seven")


def test_settings_out_of_bounds(client: Client, undisturbed: Any) -> None:
    """A setting out of its bounds is named, with the bounds."""
    with pytest.raises(InvalidInput, match=r"search\.radius_sd is 9\.0"):
        client.create_run("far", model=undisturbed["model"], dataset=undisturbed["dataset"], search={"radius_sd": 9.0})


def test_a_run_that_finds_nothing_ends_well(client: Client, undisturbed: Any, tmp_path: Path) -> None:
    """Steps too small to change anything: the run succeeds, says what was tried, and has nothing to correct."""
    settings = {"radius_sd": 0.0001, "draws_per_source": 1, "max_sources": 100}
    client.create_run(
        "nothing",
        model=undisturbed["model"],
        dataset=undisturbed["dataset"],
        search=settings,
        vae={"epochs": int(SEARCH[1])},
    )
    run = client.wait_for_run("nothing", timeout_s=RUN_TIMEOUT_S)
    assert run.state == "succeeded"
    assert run.counts.failures == 0
    assert "perturbations" in run.note
    assert client.regions("nothing") == []
    with pytest.raises(NotReady, match="no region of run 'nothing' has a label"):
        client.create_correction("nothing")


def test_a_run_can_be_cancelled(client: Client, undisturbed: Any) -> None:
    """A cancelled run ends as such, has no regions, and its name stays taken."""
    arguments = {"model": undisturbed["model"], "dataset": undisturbed["dataset"]}
    client.create_run("cancelled", **arguments, vae={"epochs": 500})
    client.cancel_run("cancelled")
    assert client.wait_for_run("cancelled", timeout_s=RUN_TIMEOUT_S).state == "cancelled"
    with pytest.raises(NotReady, match="cancelled"):
        client.regions("cancelled")
    with pytest.raises(AlreadyExists):
        client.create_run("cancelled", **arguments)


def test_two_corrections_of_one_model_at_once(client: Client, undisturbed: Any) -> None:
    """The second correction of a model is refused while the first is under way; it may come after it."""
    run = undisturbed["id"]
    client.annotate(run, "r1", label="7")
    first = client.create_correction(run, epochs=1, methods=["continued"], learning_rates=[1e-3])
    with pytest.raises(Conflict, match=f"{first.id} is under way"):
        client.create_correction(run)
    assert client.wait_for_correction(run, first.id, timeout_s=RUN_TIMEOUT_S).state == "succeeded"


def test_a_cancelled_correction(client: Client, undisturbed: Any) -> None:
    """A cancelled correction stays cancelled, cannot be released, and the next one may begin at once."""
    run = undisturbed["id"]
    client.annotate(run, "r1", label="7")
    first = client.create_correction(run, epochs=10_000)
    assert client.cancel_correction(run, first.id).state == "cancelled"
    with pytest.raises(NotReady, match="not finished"):
        client.release(run, first.id)
    second = client.create_correction(run, epochs=1, methods=["continued"], learning_rates=[1e-3])
    ended = client.wait_for_correction(run, second.id, timeout_s=RUN_TIMEOUT_S)
    assert ended.state == "succeeded", ended.error
    assert client.correction(run, first.id).state == "cancelled"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"region_weights": [1.0]}, "lambda is 1.0"),
        ({"methods": ["magic"]}, "'magic' is unknown.*last_layer"),
        ({"augmentation": {"max_shift": 2.0}}, "augmentation.max_shift is 2.0"),
        ({"augmentation": {"blur": 2.0}}, "blur"),
        ({"margin": -0.5}, "margin is -0.5"),
    ],
)
def test_corrections_that_make_no_sense(client: Client, undisturbed: Any, settings: dict[str, Any], said: str) -> None:
    """A setting that cannot be is refused by its name."""
    with pytest.raises(InvalidInput, match=said):
        client.create_correction(undisturbed["id"], **settings)


def test_a_factory_that_nobody_allowed(client: Client, undisturbed: Any) -> None:
    """A correction that names code which its operator has not allowed fails, and says what to set."""
    run = undisturbed["id"]
    client.annotate(run, "r1", label="7")
    first = client.create_correction(run, torch_factory="os:getcwd")
    ended = client.wait_for_correction(run, first.id, timeout_s=RUN_TIMEOUT_S)
    assert ended.state == "failed"
    assert "DEFUSE_TORCH_FACTORIES" in ended.error


def test_no_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address, and with one where nothing listens, the error says how to start a stack."""
    monkeypatch.delenv("DEFUSE_GATEWAY", raising=False)
    monkeypatch.setenv("DEFUSE_HOME", str(tmp_path))
    with pytest.raises(DefuseError, match="defuse up"):
        Client()
    with Client("127.0.0.1:9") as client, pytest.raises(DefuseError, match=r"127\.0\.0\.1:9"):
        client.runs()
