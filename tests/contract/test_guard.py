"""The guard on the real Triton: beside its classifier, in one request, whatever is released meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from defuse.guard_outputs import OUTPUTS
from defuse.v1 import model_pb2

from services.corrector.guard.graph import GaussianMixtures, GuardMixtures, guard_graph
from services.corrector.own_triton import Releases
from services.onnx_graph.onnx_files import onnx_function
from services.storage.artifacts import ArtifactStore
from services.triton.client import InferenceClient
from services.triton.preprocessing import preprocess
from tests.onnx_files import build_onnx_classifier
from tests.restartable_triton import CLASSES, SHAPE, Served, asked, images
from tests.unit.generator.onnx_pairs import encoder_file

MODEL, REGION = "tiny", "runs/a/regions/r1"
ASK = {"defuse-guard": "true"}
DIM = int(np.prod(SHAPE))


def guard_file(model: model_pb2.Model, *, threshold: float = 0.0) -> bytes:
    """Return a guard of one region: bright images."""
    generator = np.random.default_rng(0)
    bright, real = (generator.uniform(low, 1, (500, DIM)) for low in (0.6, 0.0))
    mixture = GaussianMixtures.of([real], [1])
    known = GuardMixtures(
        names=[REGION],
        regions=GaussianMixtures.of([bright], [1]),
        real=mixture,
        aggregate=mixture,
        log_density=np.linspace(-100, 100, 50),
        scale=np.ones(DIM),
    )
    return guard_graph(encoder_file(SHAPE), model, known, threshold=threshold)


@pytest.fixture(scope="module")
def releases(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Releases:
    store = ArtifactStore(f"file://{tmp_path_factory.mktemp('store')}")
    return Releases(store, InferenceClient(served.address), served.root / "models")


@pytest.fixture(scope="module")
def guarded(served: Served, releases: Releases) -> bytes:
    """Serve the guard; give its file."""
    file = guard_file(served.model)
    assert releases.serve_guard(served.model, file) == 1
    return file


@pytest.fixture
def client(door: str) -> Iterator[triton.InferenceServerClient]:
    with closing(triton.InferenceServerClient(door)) as client:
        yield client


def pictures() -> Any:
    """Return bright and other images in turns."""
    batch = images(6)
    batch[::2] = 0.7 + 0.3 * batch[::2]
    return batch


def expected(file: bytes, model: model_pb2.Model, batch: Any) -> dict[str, Any]:
    return dict(zip(OUTPUTS, onnx_function(file)(preprocess(batch, model)), strict=True))


def test_one_request_answers_both(client: triton.InferenceServerClient, served: Served, guarded: bytes) -> None:
    """A guarded call gets scores and the guard's outputs for each image; any other call gets scores alone."""
    model, batch = served.model, pictures()
    inputs = asked(preprocess(batch, model), model.input_name)
    plain, both = client.infer(MODEL, inputs), client.infer(MODEL, inputs, headers=ASK)
    assert [output.name for output in plain.get_response().outputs] == [model.output_name]
    np.testing.assert_array_equal(both.as_numpy(model.output_name), plain.as_numpy(model.output_name))
    told = expected(guarded, model, batch)
    assert told["defuse_inside"][::2].all()
    assert not told["defuse_inside"][1::2].any()
    for name in set(OUTPUTS) - {"defuse_region"}:
        np.testing.assert_allclose(both.as_numpy(name), told[name], rtol=1e-4, atol=1e-4)
    assert both.as_numpy("defuse_region")[:, 0].tolist() == [REGION.encode(), b""] * 3
    assert "defuse_guard" not in both.get_response().parameters


def test_outputs_that_are_named(client: triton.InferenceServerClient, served: Served, guarded: bytes) -> None:
    """Naming the classifier's output does not lose the guard's."""
    model = served.model
    wanted = [triton.InferRequestedOutput(model.output_name)]
    answer = client.infer(MODEL, asked(images(1), model.input_name), outputs=wanted, headers=ASK)
    names = {output.name for output in answer.get_response().outputs}
    assert names == {model.output_name, *OUTPUTS}


def test_a_model_without_a_guard(client: triton.InferenceServerClient, served: Served) -> None:
    """The answer is the classifier's, and says that there is no guard; an unknown model is still unknown."""
    served.put("bare", build_onnx_classifier(shape=("batch", *SHAPE)), CLASSES)
    inputs = asked(images(2), served.model.input_name)
    answer = client.infer("bare", inputs, headers=ASK)
    np.testing.assert_array_equal(
        answer.as_numpy(served.model.output_name), client.infer("bare", inputs).as_numpy(served.model.output_name)
    )
    assert answer.get_response().parameters["defuse_guard"].string_param == "absent"
    with pytest.raises(triton.InferenceServerException, match="nobody"):
        client.infer("nobody", inputs, headers=ASK)


def test_a_graph_of_one_batch_size(client: triton.InferenceServerClient, served: Served, releases: Releases) -> None:
    """A guard takes the batches that its classifier takes."""
    model = served.put("fixed", build_onnx_classifier(shape=(4, *SHAPE)), CLASSES)
    releases.serve_guard(model, guard_file(model))
    batch = images(4)
    answer = client.infer("fixed", asked(batch, model.input_name), headers=ASK)
    np.testing.assert_allclose(
        answer.as_numpy("defuse_risk"), expected(guard_file(model), model, batch)["defuse_risk"], rtol=1e-4, atol=1e-4
    )


def test_releases_under_guarded_requests(
    client: triton.InferenceServerClient, served: Served, releases: Releases, guarded: bytes, door: str
) -> None:
    """A new version of the classifier and a new guard come without a failed request, and answer afterwards."""
    model, batch = served.model, pictures()
    failures, stop, asked_for = [], threading.Event(), [0]

    def keep_asking() -> None:
        with closing(triton.InferenceServerClient(door)) as own:
            while not stop.is_set():
                try:
                    own.infer(MODEL, asked(batch, model.input_name), headers=ASK)
                except triton.InferenceServerException as error:
                    failures.append(error)
                asked_for[0] += 1

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        second = build_onnx_classifier(shape=("batch", *SHAPE), seed=9)
        served.repository.add_version(MODEL, 2, second)
        served.repository.serve(model, MODEL, [1, 2])
        never = guard_file(model, threshold=1e9)
        assert releases.serve_guard(model, never) == 2
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert asked_for[0] > 10
    answer = client.infer(MODEL, asked(batch, model.input_name), headers=ASK)
    np.testing.assert_allclose(
        answer.as_numpy(model.output_name), onnx_function(second)(batch)[0], rtol=1e-4, atol=1e-4
    )
    assert not answer.as_numpy("defuse_inside").any()
    served.repository.serve(model, MODEL, [1])


def test_the_guard_alone(served: Served, guarded: bytes) -> None:
    """Triton serves it under a name of its own, too."""
    with closing(triton.InferenceServerClient(served.address)) as direct:
        answer = direct.infer(f"{MODEL}-guard", asked(images(2), served.model.input_name), model_version="1")
    assert answer.as_numpy("defuse_typicality").shape == (2, 1)


def test_entries_are_written_where_triton_looks(served: Served, guarded: bytes) -> None:
    root: Path = served.root / "models"
    assert (root / f"{MODEL}-guard" / "1" / "model.onnx").read_bytes() == guarded
    assert (root / f"{MODEL}-guarded" / "1").is_dir()
