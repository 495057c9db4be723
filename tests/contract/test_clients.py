"""Both clients against a real gateway and Redis: long operations, and a gateway that goes away meanwhile."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from defuse import Client, DeadlineExceeded, NotFound, NotReady, OperationStatus, Release, Run, Unavailable, aio
from defuse.v1 import correction_pb2, release_pb2, run_pb2, work_pb2

from tests.conftest import eventually
from tests.gateway_process import Door, running_gateway

SEARCH, CORRECTION = "runs/first/operations/search", "runs/first/operations/c1"
TIMEOUT_S = 60


@pytest.fixture
def door(redis_url: str, tmp_path: Path) -> Iterator[Door]:
    """A gateway with a run that has a correction, both under way."""
    with running_gateway(tmp_path, redis_url) as found:
        found.plant(
            run_pb2.Run(name="runs/first", state=run_pb2.Run.STATE_PREPARING, operation=SEARCH),
            correction_pb2.Correction(
                name="runs/first/corrections/c1",
                model="models/tiny",
                state=correction_pb2.Correction.STATE_RUNNING,
                operation=CORRECTION,
            ),
        )
        yield found


def answers(client: Client) -> bool:
    try:
        return bool(client.version())
    except Unavailable:
        return False  # connections of a process know for a while that nobody was there


def failed(subject: str) -> work_pb2.Event:
    return work_pb2.Event(subject=subject, failed=work_pb2.StageFailed(error="mush", reason="VAE_TOO_COARSE"))


def progress(share: float) -> work_pb2.Event:
    step = work_pb2.StageProgress(state=run_pb2.Run.STATE_PREPARING, progress=share, note="training")
    return work_pb2.Event(subject="runs/first", progress=step)


def test_an_operation_in_hand(door: Door) -> None:
    """It is found by the name that its run says, waited for with its progress, cancelled, and forgotten."""
    with door.client() as client:
        operation = client.operation(client.run("first").operation)
        assert (operation.name, operation.status.verb, operation.status.parent) == (SEARCH, "search", "runs/first")
        with pytest.raises(DeadlineExceeded, match=f"{SEARCH} had not ended after 0.1 s; it goes on"):
            operation.wait(timeout_s=0.1)
        with pytest.raises(NotReady):
            operation.delete()
        seen: list[OperationStatus] = []

        def on_progress(status: OperationStatus) -> None:
            seen.append(status)
            if len(seen) == 1:
                door.tell(progress(0.5))
            elif not status.ended:
                door.tell(failed("runs/first"))

        ended = operation.wait(timeout_s=TIMEOUT_S, on_progress=on_progress)
        assert (ended.state, ended.error, ended.error_reason, ended.result) == (
            "failed",
            "mush",
            "VAE_TOO_COARSE",
            None,
        )
        assert [status.progress for status in seen if not status.ended][-1] == 0.5
        assert (seen[-1], operation.status) == (ended, ended)
        operation.delete()
        with pytest.raises(NotFound):
            client.operation(SEARCH)


def test_operations_are_found(door: Door) -> None:
    """Operations of a run or of all, ended or not; succeeded ones have a result."""
    door.tell(work_pb2.Event(subject="runs/first/corrections/c1", corrected={}))
    with door.client() as client:
        assert [operation.name for operation in client.operations()] == [SEARCH, CORRECTION]
        assert [operation.name for operation in client.operations("first", done=False)] == [SEARCH]
        [corrected] = client.operations(done=True)
        assert corrected.status.result == client.correction("first", "c1")
        [search] = client.operations("first", done=False)
        search.cancel()
        assert search.wait().state == client.run("first").state == "cancelled"


def test_the_same_on_an_event_loop(door: Door, tmp_path: Path) -> None:
    """Waiting for several things at once is what it is for."""
    np.savez(tmp_path / "images.npz", x_train=np.zeros((10, 8, 8), np.uint8), y_train=np.arange(10) % 2)

    async def story() -> None:
        async with aio.Client(door.address) as client:
            waiting = [
                asyncio.create_task((await client.operation(name)).wait(timeout_s=TIMEOUT_S))
                for name in (SEARCH, CORRECTION)
            ]
            dataset = await client.add_dataset(tmp_path / "images.npz")
            assert await client.add_dataset(tmp_path / "images.npz") == dataset
            [search, correction] = await client.operations("first")
            await search.cancel()
            await asyncio.to_thread(door.tell, failed("runs/first/corrections/c1"))
            assert [status.state for status in await asyncio.gather(*waiting)] == ["cancelled", "failed"]
            await correction.delete()
            assert [operation.name for operation in await client.operations()] == [SEARCH]

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["blocking", "event loop"])
def test_a_gateway_that_goes_away(redis_url: str, tmp_path: Path, kind: str) -> None:
    """Callers that follow a run or wait for its operation learn of its end from the restarted gateway."""
    begun = threading.Event()
    ended: list[OperationStatus] = []
    seen: list[Run] = []

    def follow(address: str) -> None:
        with Client(address) as client:
            operation = client.operation(SEARCH)
            waiting = threading.Thread(target=lambda: ended.append(operation.wait(timeout_s=TIMEOUT_S)), daemon=True)
            waiting.start()
            for run in client.watch_run("first", timeout_s=TIMEOUT_S):
                seen.append(run)
                begun.set()
            waiting.join()

    async def follow_on_loop(address: str) -> None:
        async with aio.Client(address) as client:
            waiting = asyncio.create_task((await client.operation(SEARCH)).wait(timeout_s=TIMEOUT_S))
            async for run in client.watch_run("first", timeout_s=TIMEOUT_S):
                seen.append(run)
                begun.set()
            ended.append(await waiting)

    with running_gateway(tmp_path, redis_url) as door:
        door.plant(run_pb2.Run(name="runs/first", state=run_pb2.Run.STATE_PREPARING))
        target = follow if kind == "blocking" else lambda address: asyncio.run(follow_on_loop(address))
        following = threading.Thread(target=target, args=(door.address,), daemon=True)
        following.start()
        assert begun.wait(TIMEOUT_S)
    door.tell(failed("runs/first"))
    with running_gateway(tmp_path, redis_url, address=door.address):
        following.join(TIMEOUT_S)
    assert [seen[-1].state, *(status.state for status in ended)] == ["failed", "failed"]


def test_a_release_outlives_its_gateway(redis_url: str, tmp_path: Path) -> None:
    """A caller waits on for a release while the gateway is away, and gets the result of one request."""
    done: list[Release] = []
    finished = correction_pb2.Correction(
        name="runs/first/corrections/c1", model="models/tiny", state=correction_pb2.Correction.STATE_SUCCEEDED
    )

    def publish(address: str) -> None:
        with Client(address) as client:
            done.append(client.release("first", "c1", reason="bold sevens"))

    with running_gateway(tmp_path, redis_url) as door, door.client() as client:
        door.plant(finished)
        releasing = threading.Thread(target=publish, args=(door.address,), daemon=True)
        releasing.start()
        eventually(lambda: client.operations(model="tiny"))
    with running_gateway(tmp_path, redis_url, address=door.address), door.client() as client:
        eventually(lambda: answers(client))
        [operation] = client.operations(model="tiny")
        publication = operation.name.replace("/operations/", "/publications/")
        release = release_pb2.Release(model="models/tiny", version=2, reason="bold sevens")
        door.tell(work_pb2.Event(subject=publication, published={"release": release}))
        releasing.join(TIMEOUT_S)
        assert [operation.wait().result] == done
    assert (done[0].version, done[0].reason) == (2, "bold sevens")
