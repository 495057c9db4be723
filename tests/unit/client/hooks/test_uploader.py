"""Programs whose gateway is absent, slow, refusing or restarting: drops are counted."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.hooks import Monitor, reporter

from tests.conftest import eventually
from tests.unit.client.hooks.servers import MODEL, Gateway, infer_request
from tests.unit.client.hooks.test_monitor import balanced, wait_until_settled

Make = Callable[..., Monitor]
Hooked = Callable[[Monitor], Any]
Code = grpc.StatusCode


def test_absent_gateway(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Observations within the capacity wait for the gateway; the others are dropped."""
    gateway.kill()
    monitor = monitored(capacity=10)
    stub = hooked(monitor)
    for number in range(25):
        assert stub.ModelInfer(infer_request(f"n{number}")).model_version == "7"
    assert (balanced(monitor.counts).waiting, monitor.counts.dropped) == (10, {"full": 15})
    gateway.start()
    assert wait_until_settled(monitor, 25).stored == 10
    assert set(gateway.stored) == {f"n{number}" for number in range(10)}


def test_slow_gateway(monitored: Make, gateway: Gateway) -> None:
    """Calls stay fast while a report is pending.

    Bytes are bounded like numbers.
    """
    gateway.responding.clear()
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
    gateway.responding.set()
    assert wait_until_settled(monitor, 1_001).stored == counts.waiting


@pytest.mark.parametrize(
    "code", [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.INTERNAL, Code.UNKNOWN]
)
def test_temporary_errors(monitored: Make, gateway: Gateway, code: grpc.StatusCode) -> None:
    """The same batch is reported again until the gateway accepts it."""
    gateway.codes = [code, code]
    monitor = monitored()
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="a")
    assert wait_until_settled(monitor, 1).stored == 1
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
def test_permanent_errors(
    monitored: Make, gateway: Gateway, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    """The batch is dropped with the gateway's reason, logged once a minute.

    The next one is stored.
    """
    gateway.codes = [code, code]
    monitor = monitored()
    with caplog.at_level(logging.WARNING, logger="defuse.hooks"):
        for number in range(2):
            monitor.log(MODEL, b"abcd", [1, 2, 3], id=f"a{number}")
            wait_until_settled(monitor, number + 1)
    assert monitor.counts.dropped == {code.name.lower(): 2}
    assert len([one for one in caplog.records if one.name == "defuse.hooks"]) == 1
    assert "planted" in caplog.text
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="b")
    assert wait_until_settled(monitor, 3).stored == 1


def test_restarting_gateway(monitored: Make, hooked: Hooked, gateway: Gateway) -> None:
    """Nothing is lost during restarts while four threads call.

    Each observation is stored once.
    """
    monitor = monitored()
    stub = hooked(monitor)
    expected = 4 * 150

    def call(thread: int) -> None:
        for number in range(150):
            stub.ModelInfer(infer_request(f"{thread}.{number}"))
            balanced(monitor.counts)

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        known = len(gateway.calls)
        eventually(lambda known=known: len(gateway.calls) > known or monitor.counts.seen == expected)  # type: ignore[misc]
        gateway.kill()
        gateway.start()
    for thread in threads:
        thread.join()
    counts = wait_until_settled(monitor, expected)
    assert (counts.stored, counts.dropped) == (expected, {})
    assert len(gateway.stored) == expected


def test_missing_tls_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Observations are dropped, and the log names the variable."""
    monkeypatch.setenv("DEFUSE_TLS_AUTHORITY", str(tmp_path / "missing.pem"))
    monkeypatch.setattr(reporter, "PERIOD_S", 0.05)
    with Monitor("grpcs://127.0.0.1:1", token="") as monitor:
        monitor.log(MODEL, b"abcd", [1, 2, 3])
        assert wait_until_settled(monitor, 1).dropped == {"bad_tls": 1}
    assert "DEFUSE_TLS_AUTHORITY" in caplog.text


def test_close_with_an_absent_gateway(monitored: Make, gateway: Gateway) -> None:
    """`close` keeps its timeout; the rest is counted as dropped."""
    gateway.kill()
    monitor = monitored()
    for number in range(5):
        monitor.log(MODEL, b"abcd", [1, 2, 3], id=f"a{number}", truth="ant")
    begin = time.monotonic()
    monitor.close(0.2)
    assert time.monotonic() - begin < 25.0
    assert balanced(monitor.counts).dropped == {"closed": 5}
    assert balanced(monitor.truth_counts).dropped == {"closed": 5}


def test_close_with_a_pending_report(monitored: Make, gateway: Gateway) -> None:
    """The pending report is aborted."""
    gateway.responding.clear()
    monitor = monitored()
    monitor.log(MODEL, b"abcd", [1, 2, 3], id="a")
    eventually(lambda: gateway.calls)
    monitor.close(0.2)
    assert balanced(monitor.counts).dropped == {"closed": 1}


def test_defect_of_the_hook(
    monitored: Make,
    hooked: Hooked,
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller has its response.

    The defect is counted, and logged once with its traceback.
    """
    monitor = monitored()
    stub = hooked(monitor)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, logger="defuse.hooks"):
        broken.setattr("defuse.hooks.monitor.count_images", lambda _: 1 // 0)
        for _ in range(3):
            assert stub.ModelInfer(infer_request("a")).model_version == "7"
        broken.setattr("defuse.hooks.reporter.batch_observations", lambda _: 1 // 0)
        monitor.log(MODEL, b"abcd", [1, 2, 3])
        wait_until_settled(monitor, 4)
    assert monitor.counts.dropped == {"defect": 4}
    [record] = [one for one in caplog.records if one.name == "defuse.hooks"]
    assert record.exc_info
    stub.ModelInfer(infer_request("b"))
    assert wait_until_settled(monitor, 5).stored == 1
    assert set(gateway.stored) == {"b"}
