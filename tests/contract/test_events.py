"""CloudEvents of inference, sent to a real gateway over HTTP."""

import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defuse import Client, LimitExceeded
from defuse.v1 import model_pb2, monitor_pb2

from services.gateway.tokens import line_of
from services.localstack.child_process import free_port
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.conftest import ROOT, eventually
from tests.events import attributes, binary, post, request_of, response_of, structured, structured_in_base64
from tests.gateway_process import running_gateway
from tests.monitored import batches_in, pictures, plant_model, stored_ids, works

Mode = Callable[[dict[str, str], Any], tuple[dict[str, str], bytes]]
SCORES = np.array([[1, 2, 3], [0.5, 0, -4]], np.float32)


@dataclass(frozen=True, kw_only=True)
class House:
    """Where events are sent, and where they end up."""

    urls: list[str]
    store: ArtifactStore
    model: model_pb2.Model
    redis_url: str

    def send(self, event_id: str, half: str, data: Any, *, mode: Mode = binary, to: int = 0, **more: str) -> Any:
        headers, body = mode(attributes(event_id, half, **more), data)
        return post(self.urls[to], headers, body)

    def arrays(self) -> Any:
        [batch] = batches_in(self.store)
        return self.store.read_arrays(keys.observed_images(batch))


@pytest.fixture
def house(redis_url: str, tmp_path: Path) -> Iterator[House]:
    """Two gateways: halves of an event may come to either."""
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}/v1/models/tiny:observe" for port in ports]
    with (
        running_gateway(tmp_path, redis_url, DEFUSE_HTTP_PORT=str(ports[0])) as door,
        running_gateway(tmp_path, redis_url, DEFUSE_HTTP_PORT=str(ports[1])),
    ):
        yield House(urls=urls, store=door.store, model=plant_model(door.store), redis_url=redis_url)


def test_parts_in_every_mode_and_order(house: House) -> None:
    """A request of n images and its response become n observations, whichever comes first, and where."""
    images = pictures(2)
    for number, mode in enumerate((binary, structured, structured_in_base64)):
        parts: list[tuple[str, Any]] = [
            ("request", request_of(images, house.model)),
            ("response", response_of(SCORES)),
        ]
        for order, first in enumerate((0, 1)):
            event_id = f"{number}{order}"
            for to, (half, data) in enumerate((parts[first], parts[1 - first])):
                assert house.send(event_id, half, data, mode=mode, to=to) == (202, None)
    wanted = sorted(f"{mode}{order}-{row}" for mode in range(3) for order in range(2) for row in range(2))
    eventually(lambda: sorted(stored_ids(house.store)) == wanted)
    eventually(lambda: len(works(house.redis_url)) == len(batches_in(house.store)))


def test_what_is_stored(house: House) -> None:
    """Images as they were before preprocessing, and what the answer says; sent again they change nothing."""
    images = pictures(2)
    for _ in range(2):
        sent = request_of(images, house.model, flat=False)
        assert house.send("a", "request", sent, time="2026-11-26T14:45:00Z") == (202, None)
        assert house.send("a", "response", response_of(SCORES), time="2026-11-26T14:45:01.5Z") == (202, None)
        eventually(lambda: works(house.redis_url))
    arrays = house.arrays()
    np.testing.assert_array_equal(arrays["image"], images)
    np.testing.assert_array_equal(arrays["scores"], SCORES)
    [batch] = batches_in(house.store)
    record = house.store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
    assert [one.id for one in record.observations] == ["a-0", "a-1"]
    assert {one.version for one in record.observations} == {"3"}
    assert record.observations[0].time.ToJsonString() == "2026-11-26T14:45:01.500Z"
    assert len(works(house.redis_url)) == 1


def test_a_half_outlives_its_gateway(redis_url: str, tmp_path: Path) -> None:
    """It waits in Redis, not in a process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/models/tiny:observe"
    model = plant_model(ArtifactStore(f"file://{tmp_path}/store"))
    parts = {"request": request_of(pictures(2), model), "response": response_of(SCORES)}
    for half, data in parts.items():
        with running_gateway(tmp_path, redis_url, DEFUSE_HTTP_PORT=str(port)) as door:
            assert post(url, *binary(attributes("a", half), data)) == (202, None)
            if half == "response":
                eventually(lambda: stored_ids(door.store) == ["a-0", "a-1"])


def test_what_is_refused(house: House) -> None:
    """With a status and a sentence; nothing of it is stored."""
    request = request_of(pictures(2), house.model)
    good = attributes("a", "request")
    refused: list[tuple[tuple[dict[str, str], bytes], str]] = [
        (binary({**good, "specversion": "0.3"}, request), "specversion '0.3'"),
        (binary({**good, "id": ""}, request), "the event has no id"),
        (binary({**good, "type": "other"}, request), "the event has type 'other'"),
        (binary({**good, "time": "yesterday"}, request), "the event has time 'yesterday'"),
        (binary({**good, "time": "1969-12-31T23:59:59Z"}, request), "has a time of -1 s; give seconds since 1970"),
        (binary({**good, "id": "x" * 117}, request), "is refused: use 1 to 116 printable characters"),
        ((binary(good, request)[0], b"{"), "the event's data are no JSON"),
        (structured(good, [request]), "the event's data are no JSON object"),
        (({"Content-Type": "application/cloudevents-batch+json"}, b"[]"), "events come one a request"),
        (binary(good, {"instances": []}), "the payload has no inputs"),
        (binary(good, {"inputs": [{**request["inputs"][0], "datatype": "INT8"}]}), "the input has datatype 'INT8'"),
        (binary(good, {"inputs": [{**request["inputs"][0], "shape": [2, 60]}]}), "it is n x 3x4x5"),
        (binary(good, {"inputs": [{**request["inputs"][0], "data": [1, 2]}]}), "are not 2x3x4x5 numbers"),
        (binary(attributes("a", "response"), response_of(SCORES[:, :2])), "it is n x 3"),
    ]
    for event, words in refused:
        status, error = post(house.urls[0], *event)
        assert (status, words in error["message"]) == (400, True), error
    status, error = post(house.urls[0].replace("tiny", "none"), *binary(good, request))
    assert (status, error["reason"]) == (404, "MODEL_NOT_FOUND")
    assert batches_in(house.store) == []


def test_who_may_send_events(redis_url: str, tmp_path: Path) -> None:
    """Where callers show tokens, an operator's is needed."""
    tokens, port = tmp_path / "tokens", free_port()
    tokens.write_text(f"{line_of('ann', 'operator', 'let-me-in')}\n{line_of('bob', 'viewer', 'let-me-look')}\n")
    variables = {"DEFUSE_TOKENS_FILE": str(tokens), "DEFUSE_HTTP_PORT": str(port)}
    with running_gateway(tmp_path, redis_url, **variables) as door:
        event = binary(attributes("a", "response"), response_of(SCORES))
        plant_model(door.store)
        answers = {}
        for token in ("", "nonsense", "let-me-look", "let-me-in"):
            headers = {**event[0], "Authorization": f"Bearer {token}"} if token else event[0]
            answers[token] = post(f"http://127.0.0.1:{port}/v1/models/tiny:observe", headers, event[1])[0]
    assert answers == {"": 401, "nonsense": 401, "let-me-look": 403, "let-me-in": 202}


def test_an_event_that_is_too_large(redis_url: str, tmp_path: Path) -> None:
    """It is refused by the limit of all messages, and the next one is taken."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/models/tiny:observe"
    variables = {"DEFUSE_HTTP_PORT": str(port), "DEFUSE_MAX_MESSAGE_BYTES": "65536"}
    with running_gateway(tmp_path, redis_url, **variables) as door:
        plant_model(door.store)
        headers, body = binary(attributes("a", "response"), response_of(SCORES))
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(urllib.request.Request(url, body.ljust(70_000), headers), timeout=30)
        assert post(url, headers, body.ljust(60_000)) == (202, None)


def test_events_that_are_refused_count(redis_url: str, tmp_path: Path) -> None:
    """Callers over HTTP and over gRPC are rate-limited together."""
    tokens, port = tmp_path / "tokens", free_port()
    tokens.write_text(line_of("bob", "viewer", "let-me-look"))
    variables = {"DEFUSE_HTTP_PORT": str(port), "DEFUSE_MAX_CALLS_PER_S": "0.01"}
    with running_gateway(tmp_path, redis_url, DEFUSE_TOKENS_FILE=str(tokens), **variables) as door:
        url, event = f"http://127.0.0.1:{port}/v1/models/tiny:observe", binary(attributes("a", "response"), {})
        viewer = {**event[0], "Authorization": "Bearer let-me-look"}
        assert [post(url, headers, event[1])[0] for headers in (event[0], viewer) for _ in range(2)] == [
            401,
            429,
            403,
            429,
        ]
        with Client(door.address, token="let-me-look") as client, pytest.raises(LimitExceeded, match="bob calls more"):
            client.version()


@pytest.mark.openssl
def test_with_certificates(redis_url: str, tmp_path: Path) -> None:
    """Where the gateway has one it speaks TLS, and where it trusts an authority its callers show theirs."""
    subprocess.run([ROOT / "deploy" / "make-certificates.sh", tmp_path / "made"], check=True, capture_output=True)
    names = {"CERTIFICATE": "certificate.pem", "KEY": "key.pem", "AUTHORITY": "authority.pem"}
    own, port = tmp_path / "made" / "gateway", free_port()
    variables = {f"DEFUSE_TLS_{part}": str(own / file) for part, file in names.items()}
    url = f"https://localhost:{port}/v1/models/tiny:observe"
    event = binary(attributes("a", "response"), response_of(SCORES))
    stranger = ssl.create_default_context(cafile=own / names["AUTHORITY"])
    friend = ssl.create_default_context(cafile=own / names["AUTHORITY"])
    friend.load_cert_chain(
        tmp_path / "made" / "client" / names["CERTIFICATE"], tmp_path / "made" / "client" / names["KEY"]
    )
    with running_gateway(tmp_path, redis_url, DEFUSE_HTTP_PORT=str(port), **variables) as door:
        plant_model(door.store)
        assert post(url, *event, context=friend) == (202, None)
        with pytest.raises(OSError, match=r"(?i)certificate|EOF|reset|closed"):
            post(url, *event, context=stranger)
