"""Live traffic through a hook: without change nothing is raised; drift into a known region is named and searched."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from defuse import Alert, Client, hooks

from tests.conftest import Stack, eventually
from tests.planted import TRUE, Planted
from tests.scenario.conftest import RUN_TIMEOUT_S, SEARCH, register

MODEL, RUN = "watched", "watched"
# A false alarm during the calm traffic has a probability of at most 1 / 250, for any trained guard.
RUN_LENGTH = 50_000
UNCHANGED = RUN_LENGTH // 250


@pytest.fixture(scope="module")
def guarded(stack: Stack, planted: Planted) -> Any:
    """A guard of the spot, for a model that no other test corrects, and a monitor that starts runs."""
    register(stack, planted, MODEL)
    stack.defuse("runs", "create", "--model", MODEL, "--data", planted.data, "--name", RUN, *SEARCH, "--wait")
    stack.defuse("annotate", RUN, "r1", "--label", str(TRUE))
    guard = stack.defuse("guards", "create", RUN)
    stack.defuse("monitor", "configure", MODEL, "--run-length", str(RUN_LENGTH), "--start-runs")
    return guard


@pytest.fixture
def monitor(stack: Stack) -> Iterator[hooks.Monitor]:
    with hooks.Monitor(stack.gateway) as monitor:
        yield monitor


def ask(stack: Stack, planted: Planted, monitor: hooks.Monitor, images: Any, *, name: str) -> None:
    """Ask about stored images (n, h, w, c), one after the other, through a client with the hook in it."""
    pixels = (images.transpose(0, 3, 1, 2) / 255 - float(planted.mean)) / float(planted.std)
    with triton.InferenceServerClient(stack.gateway) as client:
        hooks.watch(client, monitor)
        input_name = client.get_model_metadata(MODEL).inputs[0].name
        for number, image in enumerate(pixels.astype(np.float32)):
            tensor = triton.InferInput(input_name, [1, *image.shape], "FP32")
            tensor.set_data_from_numpy(image[None])
            client.infer(MODEL, [tensor], request_id=f"{name}-{number}")


def about_regions(client: Client) -> list[Alert]:
    """Return the alerts about regions; that more ones are answered is told, too."""
    return [alert for alert in client.alerts(MODEL) if alert.kind == "region_hits"]


def drawn(images: Any, count: int, seed: int) -> Any:
    return images[np.random.default_rng(seed).integers(len(images), size=count)]


@pytest.mark.usefixtures("guarded")
def test_traffic_that_drifts_into_a_known_region(stack: Stack, planted: Planted, monitor: hooks.Monitor) -> None:
    """No alert in a small part of the run length of calm; then half of the traffic moves, and the alert names where."""
    ask(stack, planted, monitor, drawn(planted.others, UNCHANGED, 0), name="calm")
    with stack.client() as client:
        eventually(lambda: client.monitor(MODEL).observations == UNCHANGED)
        assert client.alerts(MODEL) == []
        drifted = np.concatenate([drawn(planted.spot, 150, 1), drawn(planted.others, 150, 2)])
        ask(stack, planted, monitor, np.random.default_rng(3).permutation(drifted), name="drift")
        eventually(lambda: about_regions(client))
        [alert] = about_regions(client)
        assert alert.subject == f"runs/{RUN}/regions/r1"
        eventually(lambda: about_regions(client)[0].run)
        run = client.wait_for_run(about_regions(client)[0].run, timeout_s=RUN_TIMEOUT_S)
    counts = monitor.counts
    assert (counts.stored, counts.waiting, sum(counts.dropped.values())) == (UNCHANGED + 300, 0, 0)
    assert run.state == "succeeded", run.error
    assert run.counts.sources > 10


@pytest.mark.usefixtures("guarded")
def test_truth_that_comes_later(stack: Stack, planted: Planted, monitor: hooks.Monitor) -> None:
    """Real accuracy is that of the images whose truth was said: the spot is misread."""
    ask(stack, planted, monitor, planted.spot[:20], name="spot")
    monitor.close(30)
    with stack.client() as client:
        assert client.attach_truth(MODEL, {f"spot-{number}": str(TRUE) for number in range(20)}) == 20
        eventually(lambda: client.monitor(MODEL).truths == 20)
        assert client.monitor(MODEL).right < 10
        assert client.delete_observations(MODEL, [f"spot-{number}" for number in range(20)]) == 20
        eventually(lambda: client.monitor(MODEL).truths == 0)
