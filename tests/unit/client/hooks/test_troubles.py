"""A program whose gateway is absent, slow, refusing or restarting does not notice, and is told what was dropped."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.hooks import Monitor, background

from tests.conftest import eventually
from tests.unit.client.hooks.servers import MODEL, Gateway, asking
from tests.unit.client.hooks.test_monitor import balanced, settled

Make = Callable[..., Monitor]
Hooked = Callable[[Monitor], Any]
Code = grpc.StatusCode


def test_a_gateway_that_is_not_there(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """As many as there is room for wait, and arrive when it comes; the others are counted."""
    gateway.kill()
    monitor = monitored(capacity=10)
    stub = hooked(monitor)
    for number in range(25):
        assert stub.ModelInfer(asking(f"n{number}")).model_version == "7"
    assert (balanced(monitor.counts).waiting, monitor.counts.dropped) == (10, {"full": 15})
    gateway.start()
    assert settled(monitor, 25).stored == 10
    assert set(gateway.stored) == {f"n{number}" for number in range(10)}


def test_a_gateway_that_is_slow(monitored: Make, gateway: Gateway) -> None:
    """What a program does takes no longer while its report is not answered; bytes are bounded like numbers."""
    gateway.answers.clear()
    monitor = monitored(capacity_bytes=100_000)
    monitor.log(MODEL, bytes(1_000), [1, 2, 3], id="first")
    eventually(lambda: gateway.calls)
    begin = time.monotonic()
    for number in range(1_000):
        monitor.log(MODEL, bytes(1_000), [1, 2, 3], id=f"s{number}")
    assert time.monotonic() - begin < 25.0  # an answer takes 30 s
    counts = balanced(monitor.counts)
    assert 50 < counts.waiting < 100
    assert counts.dropped == {"full": 1_001 - counts.waiting}
    gateway.answers.set()
    assert settled(monitor, 1_001).stored == counts.waiting


@pytest.mark.parametrize(
    "code", [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.INTERNAL, Code.UNKNOWN]
)
def test_a_gateway_that_refuses_for_now(monitored: Make, gateway: Gateway, code: grpc.StatusCode) -> None:
    """The same batch is reported again until it is taken."""
    gateway.codes = [code, code]
    monitor = monitored()
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="a")
    assert settled(monitor, 1).stored == 1
    assert (len(gateway.calls), len(gateway.batches)) == (3, 1)


@pytest.mark.parametrize(
    "code",
    [
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.PERMISSION_DENIED,
        Code.UNAUTHENTICATED,
        Code.UNIMPLEMENTED,
    ],
)
def test_a_gateway_that_refuses_for_good(
    monitored: Make, gateway: Gateway, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    """It is dropped with the gateway's reason, said once in a while, and what comes next is reported."""
    gateway.codes = [code, code]
    monitor = monitored()
    with caplog.at_level(logging.WARNING, logger="defuse.hooks"):
        for number in range(2):
            monitor.log(MODEL, b"abcd", [1, 2, 3], id=f"a{number}")
            settled(monitor, number + 1)
    assert monitor.counts.dropped == {code.name.lower(): 2}
    assert len([one for one in caplog.records if one.name == "defuse.hooks"]) == 1
    assert "planted" in caplog.text
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="b")
    assert settled(monitor, 3).stored == 1


def test_a_gateway_that_restarts(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Broken off again and again while four threads ask, nothing is lost: it is stored once, or dropped and counted."""
    monitor = monitored()
    stub = hooked(monitor)
    asked = 4 * 150

    def ask(thread: int) -> None:
        for number in range(150):
            stub.ModelInfer(asking(f"{thread}.{number}"))
            balanced(monitor.counts)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        known = len(gateway.calls)
        eventually(lambda known=known: len(gateway.calls) > known or monitor.counts.seen == asked)  # type: ignore[misc]
        gateway.kill()
        gateway.start()
    for thread in threads:
        thread.join()
    counts = settled(monitor, asked)
    assert (counts.stored, counts.dropped) == (asked, {})
    assert len(gateway.stored) == asked


def test_tls_files_that_are_not_there_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is seen meanwhile is dropped, and the variable is named."""
    monkeypatch.setenv("DEFUSE_TLS_AUTHORITY", str(tmp_path / "missing.pem"))
    monkeypatch.setattr(background, "PERIOD_S", 0.05)
    with Monitor("grpcs://127.0.0.1:1", token="") as monitor:
        monitor.log(MODEL, b"abcd", [1, 2, 3])
        assert settled(monitor, 1).dropped == {"bad_tls": 1}
    assert "DEFUSE_TLS_AUTHORITY" in caplog.text


def test_closing_while_the_gateway_is_away(monitored: Make, gateway: Gateway) -> None:
    """It takes as long as was said, and what could not be reported is counted."""
    gateway.kill()
    monitor = monitored()
    for number in range(5):
        monitor.log(MODEL, b"abcd", [1, 2, 3], id=f"a{number}", truth="ant")
    begin = time.monotonic()
    monitor.close(0.2)
    assert time.monotonic() - begin < 25.0
    assert balanced(monitor.counts).dropped == {"closed": 5}
    assert balanced(monitor.truth_counts).dropped == {"closed": 5}


def test_closing_while_the_gateway_does_not_answer(monitored: Make, gateway: Gateway) -> None:
    """A report that is under way is given up."""
    gateway.answers.clear()
    monitor = monitored()
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="a")
    eventually(lambda: gateway.calls)
    monitor.close(0.2)
    assert balanced(monitor.counts).dropped == {"closed": 1}


def test_a_defect_of_the_hook(
    monitored: Make,
    hooked: Hooked,
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller has his answer; it is counted, and logged once with its place."""
    monitor = monitored()
    stub = hooked(monitor)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, logger="defuse.hooks"):
        broken.setattr("defuse.hooks.monitor.images_in", lambda _: 1 // 0)
        for _ in range(3):
            assert stub.ModelInfer(asking("a")).model_version == "7"
        broken.setattr("defuse.hooks.reporter.batches", lambda _: 1 // 0)
        monitor.log(MODEL, b"abcd", [1, 2, 3])
        settled(monitor, 4)
    assert monitor.counts.dropped == {"defect": 4}
    [record] = [one for one in caplog.records if one.name == "defuse.hooks"]
    assert record.exc_info
    stub.ModelInfer(asking("b"))
    assert settled(monitor, 5).stored == 1
    assert set(gateway.stored) == {"b"}
