"""Inference through the public door: Triton's own client, a gateway's passage and a Triton, each on a real port."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from defuse.tls import TlsFiles
from defuse.v1 import trial_pb2
from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2, service_pb2_grpc
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from services.gateway.inference.proxy import InferenceProxy
from services.gateway.inference.routing import RoutingTable
from services.gateway.inference.shadow import TrialCounters
from services.gateway.trials.trials import Trials
from services.localstack.child_process import free_port
from services.runtime.interceptors import ErrorInterceptor
from services.storage.artifacts import ArtifactStore
from tests.unit.gateway.trying import CANDIDATE, CANDIDATE_VERSION, TRIAL, Trial, finished, wanted, with_trials

CANARY, SHADOW = Trial.MODE_CANARY, Trial.MODE_SHADOW
# Three images; champion and challenger name the same class for two of them.
IMAGES = np.arange(6, dtype=np.float32).reshape(3, 2)
SCORES = {
    "tiny": np.array([[3, 1], [3, 1], [3, 1]], np.float32),
    CANDIDATE: np.array([[9, 7], [7, 9], [9, 7]], np.float32),
}
UNKNOWN = "Request for unknown model: 'tiny' is not found"
BROKEN = grpc.StatusCode.INTERNAL
# A test that takes longer fails.
TEST_TIMEOUT_S = 60.0


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with the scores of a model, and remembers who was asked what, with how much time."""

    def __init__(self) -> None:
        self.requests: list[service_pb2.ModelInferRequest] = []
        self.seconds_left: list[float | None] = []
        self.told: list[str] = []
        # Models that fail, each with its code; and those that answer only once they may.
        self.failing: dict[str, grpc.StatusCode] = {}
        self.waiting: set[str] = set()
        self.may_answer = asyncio.Event()
        self.abandoned = asyncio.Event()
        # What an answer has instead of the scores' bytes.
        self.raw: Sequence[bytes] | None = None
        self.datatype = "FP32"

    @property
    def asked(self) -> list[tuple[str, str]]:
        return [(request.model_name, request.model_version) for request in self.requests]

    async def ModelInfer(  # noqa: N802  # gRPC's name
        self, request: service_pb2.ModelInferRequest, context: Any
    ) -> service_pb2.ModelInferResponse:
        self.requests.append(request)
        self.seconds_left.append(context.time_remaining())
        if request.model_name in self.failing:
            await context.abort(self.failing[request.model_name], UNKNOWN)
        if request.model_name in self.waiting:
            try:
                await self.may_answer.wait()
            finally:
                self.abandoned.set()
        scores = SCORES[request.model_name]
        return service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version or "1",
            id=request.id,
            outputs=[{"name": "scores", "datatype": self.datatype, "shape": scores.shape}],
            raw_output_contents=[scores.tobytes()] if self.raw is None else self.raw,
        )

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == "tiny")

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="triton", extensions=["statistics"])

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name != "tiny":
            await context.abort(grpc.StatusCode.NOT_FOUND, UNKNOWN)
        return service_pb2.ModelMetadataResponse(name=request.name, versions=["1", request.version])

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelConfigResponse(config={"name": request.name, "max_batch_size": 77})

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelStatisticsResponse(model_stats=[{"name": request.name, "inference_count": 5}])

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.told.append("index")
        return service_pb2.RepositoryIndexResponse()

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.told.append("load")
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.told.append("unload")
        return service_pb2.RepositoryModelUnloadResponse()


@dataclass(frozen=True, kw_only=True)
class Door:
    """A gateway's door, Triton's own client at it, and what a trial has seen there."""

    client: InferenceServerClient
    # The same client at Triton itself.
    direct: InferenceServerClient
    channel: grpc.aio.Channel
    trials: Trials
    tally: TrialCounters

    async def infer(self, model: str = "tiny", **how: Any) -> Any:
        return await infer(self.client, model, **how)

    async def counts(self, **expected: int) -> trial_pb2.TrialCounts:
        """Return what the trial has seen, once these counts are as expected."""
        while True:
            await self.tally.flush()
            found = (await self.trials.get(TRIAL)).counts
            if all(getattr(found, field) == value for field, value in expected.items()):
                return found
            await asyncio.sleep(0.02)


async def infer(client: InferenceServerClient, model: str = "tiny", **how: Any) -> Any:
    images = InferInput("image", IMAGES.shape, "FP32")
    images.set_data_from_numpy(IMAGES)
    return await client.infer(model, [images], **how)


Ask = Callable[[Door], Awaitable[Any]]
Serve = Callable[..., Any]


@pytest.fixture
def through_the_door(redis_url: str, store: ArtifactStore) -> Serve:
    """Give what serves a Triton and a gateway before it, with a trial or none, and returns what `ask` returns."""

    def serve(
        ask: Ask, triton: Triton | None = None, trial: trial_pb2.Trial | None = None, *, absent: bool = False
    ) -> Any:
        async def story(trials: Trials, _: Trials) -> Any:
            tally, routes = TrialCounters(trials), RoutingTable(trials)
            if trial is not None:
                routes.show([await trials.start(trial)], since=math.inf)
            after_cursor, front = grpc.aio.server(), grpc.aio.server(interceptors=[ErrorInterceptor()])
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton or Triton(), after_cursor)
            port = free_port() if absent else after_cursor.add_insecure_port("127.0.0.1:0")
            proxy = InferenceProxy(f"127.0.0.1:{port}", TlsFiles(), routes, tally, shared_memory=True)
            front.add_generic_rpc_handlers((proxy,))
            door = f"127.0.0.1:{front.add_insecure_port('127.0.0.1:0')}"
            for server in (front,) if absent else (after_cursor, front):
                await server.start()
            try:
                async with (
                    InferenceServerClient(door) as client,
                    InferenceServerClient(f"127.0.0.1:{port}") as direct,
                    grpc.aio.insecure_channel(door) as channel,
                ):
                    found = Door(client=client, direct=direct, channel=channel, trials=trials, tally=tally)
                    return await asyncio.wait_for(ask(found), TEST_TIMEOUT_S)
            finally:
                await proxy.close()
                await front.stop(None)
                await after_cursor.stop(None)

        return with_trials(redis_url, store, story, finished())

    return serve


async def refused(call: Awaitable[Any]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        await call
    return caught.value.status(), caught.value.message()


def test_a_request_arrives_as_it_was_sent(through_the_door: Serve) -> None:
    """Question and answer are what Triton's own client sends and gets without a gateway, field by field."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        how = {"request_id": "seven", "model_version": "1", "priority": 3, "parameters": {"who": "ann"}}
        return [(await infer(client, **how)).get_response() for client in (door.client, door.direct)]

    through, direct = through_the_door(ask, triton)
    assert through == direct
    assert triton.requests[0] == triton.requests[1]
    assert triton.requests[0].raw_input_contents == [IMAGES.tobytes()]
    assert triton.requests[0].parameters["who"].string_param == "ann"


def test_scores_are_read_as_ever(through_the_door: Serve) -> None:
    """A caller that knows nothing of Defuse gets its array."""

    async def ask(door: Door) -> Any:
        return (await door.infer()).as_numpy("scores")

    np.testing.assert_array_equal(through_the_door(ask), SCORES["tiny"])


def test_the_deadline_is_passed_on(through_the_door: Serve) -> None:
    """Triton gets the deadline of the caller; a caller without a deadline has none there either."""
    triton = Triton()
    deadlines_s = (2 * TEST_TIMEOUT_S, 20 * TEST_TIMEOUT_S)

    async def ask(door: Door) -> None:
        for deadline_s in deadlines_s:
            await door.infer(client_timeout=deadline_s)
        await door.infer()

    through_the_door(ask, triton)
    *with_deadline, without = triton.seconds_left
    for seconds_left, deadline_s in zip(with_deadline, deadlines_s, strict=True):
        assert seconds_left is not None
        # The test ends before TEST_TIMEOUT_S; gRPC rounds a timeout up to three digits on each of two hops.
        assert deadline_s - TEST_TIMEOUT_S < seconds_left < 1.05 * deadline_s
    assert without is None


def test_a_caller_that_goes_away_ends_the_work_behind(through_the_door: Serve) -> None:
    """A request that its caller cancels is cancelled at Triton too."""
    triton = Triton()
    triton.waiting = {"tiny"}

    async def ask(door: Door) -> bool:
        call = asyncio.create_task(door.infer())
        while not triton.requests:
            await asyncio.sleep(0.02)
        assert not triton.abandoned.is_set()
        call.cancel()
        return await triton.abandoned.wait()

    assert through_the_door(ask, triton)


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, BROKEN])
def test_an_error_has_tritons_code_and_words(through_the_door: Serve, code: grpc.StatusCode) -> None:
    """Callers that handle Triton's errors find them unchanged."""
    triton = Triton()
    triton.failing = {"tiny": code}

    async def ask(door: Door) -> Any:
        return [await refused(infer(client)) for client in (door.client, door.direct)]

    through, direct = through_the_door(ask, triton)
    assert through == direct == (str(code), UNKNOWN)


def test_a_triton_that_is_not_there(through_the_door: Serve) -> None:
    """Without Triton the door says Unavailable."""

    async def ask(door: Door) -> Any:
        return [await refused(call) for call in (door.infer(), door.client.is_server_live())]

    assert [status for status, _ in through_the_door(ask, absent=True)] == ["StatusCode.UNAVAILABLE"] * 2


def test_bytes_that_are_no_request(through_the_door: Serve) -> None:
    """They are refused at the door, and Triton is not asked."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\x0a\x05tiny")
        return caught.value.code(), caught.value.details()

    code, words = through_the_door(ask, triton)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "no ModelInferRequest" in words
    assert triton.requests == []


def test_what_callers_are_told_of_models(through_the_door: Serve) -> None:
    """Readiness, metadata, configuration and statistics are Triton's own, and so are their errors."""

    async def ask(door: Door) -> None:
        client = door.client
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("tiny")
        assert not await client.is_model_ready("huge")
        assert (await client.get_server_metadata()).name == "triton"
        assert list((await client.get_model_metadata("tiny", "2")).versions) == ["1", "2"]
        assert (await client.get_model_config("tiny")).config.max_batch_size == 77
        assert (await client.get_inference_statistics("tiny")).model_stats[0].inference_count == 5
        assert await refused(client.get_model_metadata("huge")) == ("StatusCode.NOT_FOUND", UNKNOWN)

    through_the_door(ask)


def test_nobody_changes_models_through_the_door(through_the_door: Serve) -> None:
    """Loading, unloading and the repository are not offered, and Triton hears nothing of them."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        client = door.client
        calls = (client.load_model("tiny"), client.unload_model("tiny"), client.get_model_repository_index())
        return [await refused(call) for call in calls]

    assert [status for status, _ in through_the_door(ask, triton)] == ["StatusCode.UNIMPLEMENTED"] * 3
    assert triton.told == []


@pytest.mark.parametrize(
    ("mode", "version", "asked"),
    [
        (None, "champion", ("tiny", "")),
        (CANARY, "champion", ("tiny", "")),
        (SHADOW, "champion", ("tiny", "")),
        (CANARY, "challenger", (CANDIDATE, "3")),
        (SHADOW, "challenger", (CANDIDATE, "3")),
        (CANARY, "1", ("tiny", "1")),
        (SHADOW, "1", ("tiny", "1")),
    ],
)
def test_a_version_that_is_asked_for(through_the_door: Serve, mode: Any, version: str, asked: tuple[str, str]) -> None:
    """Versions by word or number get what they name, and do not count in a trial of all requests."""
    triton = Triton()

    async def ask(door: Door) -> None:
        await door.infer(model_version=version)
        if mode:
            assert await door.counts() == trial_pb2.TrialCounts()

    through_the_door(ask, triton, wanted(mode, share=1) if mode else None)
    assert triton.asked == [asked]


def test_a_challenger_that_is_not_there(through_the_door: Serve) -> None:
    """Without a trial `challenger` is NotFound, and Triton is not asked."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        return await refused(door.infer(model_version="challenger"))

    status, words = through_the_door(ask, triton)
    assert status == "StatusCode.NOT_FOUND"
    assert "no trial is under way" in words
    assert triton.requests == []


def test_a_canary_of_all_requests_is_answered_by_the_challenger(through_the_door: Serve) -> None:
    """Callers get the candidate's scores for their own images and id, the champion is not asked, and it is counted."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        answer = await door.infer(request_id="seven", client_timeout=25)
        return answer, await door.counts(challenger_requests=1)

    answer, counts = through_the_door(ask, triton, wanted(CANARY, share=1))
    np.testing.assert_array_equal(answer.as_numpy("scores"), SCORES[CANDIDATE])
    assert triton.asked == [(CANDIDATE, str(CANDIDATE_VERSION))]
    assert (triton.requests[0].id, triton.requests[0].raw_input_contents) == ("seven", [IMAGES.tobytes()])
    assert triton.seconds_left[0] is not None
    assert (counts.champion_requests, counts.challenger_errors, counts.compared) == (0, 0, 0)
    assert counts.challenger_ms > 0


def test_requests_that_are_not_drawn_are_counted_for_the_champion(through_the_door: Serve) -> None:
    """Ids of a small share go to the champion, and the trial has its time to compare with."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        for number in range(3):
            await door.infer(request_id=f"id-{number}")
        return await door.counts(champion_requests=3)

    counts = through_the_door(ask, triton, wanted(CANARY, share=1e-9))
    assert triton.asked == [("tiny", "")] * 3
    assert counts.challenger_requests == 0
    assert counts.champion_ms > 0


@pytest.mark.parametrize("code", [BROKEN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND])
def test_where_the_challenger_fails_the_champion_answers(through_the_door: Serve, code: grpc.StatusCode) -> None:
    """Callers get an answer all the same, and the failure is counted."""
    triton = Triton()
    triton.failing = {CANDIDATE: code}

    async def ask(door: Door) -> Any:
        return (await door.infer()).as_numpy("scores"), await door.counts(challenger_errors=1)

    scores, counts = through_the_door(ask, triton, wanted(CANARY, share=1))
    np.testing.assert_array_equal(scores, SCORES["tiny"])
    assert triton.asked == [(CANDIDATE, "3"), ("tiny", "")]
    assert (counts.champion_requests, counts.challenger_requests, counts.challenger_ms) == (1, 1, 0)


def test_where_both_fail_the_caller_hears_it(through_the_door: Serve) -> None:
    """The champion's error is the answer."""
    triton = Triton()
    triton.failing = {CANDIDATE: BROKEN, "tiny": grpc.StatusCode.NOT_FOUND}

    async def ask(door: Door) -> Any:
        return await refused(door.infer())

    assert through_the_door(ask, triton, wanted(CANARY, share=1)) == ("StatusCode.NOT_FOUND", UNKNOWN)


def test_a_challenger_that_takes_too_long_is_answered_by_the_champion(through_the_door: Serve) -> None:
    """It has half of the caller's time; callers get the champion's scores in the other half, and it counts."""
    triton = Triton()
    triton.waiting = {CANDIDATE}

    async def ask(door: Door) -> Any:
        return (await door.infer(client_timeout=10)).as_numpy("scores"), await door.counts(challenger_errors=1)

    scores, counts = through_the_door(ask, triton, wanted(CANARY, share=1))
    np.testing.assert_array_equal(scores, SCORES["tiny"])
    assert (counts.champion_requests, counts.challenger_requests) == (1, 1)


def test_where_nobody_waits_any_more_the_champion_is_not_asked(through_the_door: Serve) -> None:
    """A call that was given up ends with the challenger; it did not fail."""
    triton = Triton()
    triton.waiting = {CANDIDATE}

    async def ask(door: Door) -> Any:
        call = asyncio.create_task(door.infer())
        while not triton.requests:
            await asyncio.sleep(0.02)
        call.cancel()
        await triton.abandoned.wait()
        return await door.counts(challenger_errors=0)

    counts = through_the_door(ask, triton, wanted(CANARY, share=1))
    assert counts.champion_requests == 0
    assert triton.asked == [(CANDIDATE, "3")]


def test_a_triton_that_stops(through_the_door: Serve) -> None:
    """It cancels what it has; of that callers hear as of any server that is away, since none of them asked for it."""
    triton = Triton()
    triton.failing = {CANDIDATE: grpc.StatusCode.CANCELLED, "tiny": grpc.StatusCode.CANCELLED}

    async def ask(door: Door) -> Any:
        return await refused(door.infer())

    status, _ = through_the_door(ask, triton, wanted(CANARY, share=1))
    assert status == "StatusCode.UNAVAILABLE"
    assert [model for model, _ in triton.asked] == [CANDIDATE, "tiny"]


def test_a_shadow_compares_and_the_champion_answers(through_the_door: Serve) -> None:
    """Callers get the champion's scores; the challenger sees the same request, and agreement is counted by image."""
    triton = Triton()

    async def ask(door: Door) -> Any:
        return (await door.infer(request_id="seven")).as_numpy("scores"), await door.counts(compared=3)

    scores, counts = through_the_door(ask, triton, wanted(SHADOW, share=1))
    np.testing.assert_array_equal(scores, SCORES["tiny"])
    assert triton.asked == [("tiny", ""), (CANDIDATE, "3")]
    assert triton.requests[1].raw_input_contents == triton.requests[0].raw_input_contents
    assert triton.requests[1].id == "seven"
    assert (counts.agreed, counts.dropped, counts.challenger_errors) == (2, 0, 0)
    assert (counts.champion_requests, counts.challenger_requests) == (1, 1)


def test_no_caller_waits_for_a_shadow(through_the_door: Serve) -> None:
    """Answers come while the challenger still thinks; beyond four comparisons at a time requests are dropped."""
    triton = Triton()
    triton.waiting = {CANDIDATE}

    async def ask(door: Door) -> Any:
        for _ in range(6):
            await door.infer()
        before = await door.counts(dropped=2, challenger_requests=4)
        triton.may_answer.set()
        return before, await door.counts(compared=12)

    before, after = through_the_door(ask, triton, wanted(SHADOW, share=1))
    assert (before.champion_requests, before.compared) == (6, 0)
    assert (after.agreed, after.dropped) == (8, 2)


def test_a_shadow_that_fails_is_nobodys_business(through_the_door: Serve) -> None:
    """Callers get the champion's answer, and the failure is counted."""
    triton = Triton()
    triton.failing = {CANDIDATE: BROKEN}

    async def ask(door: Door) -> Any:
        return (await door.infer()).as_numpy("scores"), await door.counts(challenger_errors=1)

    scores, counts = through_the_door(ask, triton, wanted(SHADOW, share=1))
    np.testing.assert_array_equal(scores, SCORES["tiny"])
    assert (counts.challenger_requests, counts.compared, counts.dropped) == (1, 0, 0)


def test_a_champion_that_fails_is_not_compared(through_the_door: Serve) -> None:
    """Without an answer there is nothing to compare, and the challenger is left in peace."""
    triton = Triton()
    triton.failing = {"tiny": BROKEN}

    async def ask(door: Door) -> Any:
        return await refused(door.infer())

    assert through_the_door(ask, triton, wanted(SHADOW, share=1)) == (str(BROKEN), UNKNOWN)
    assert triton.asked == [("tiny", "")]


@pytest.mark.parametrize(
    ("raw", "datatype"),
    [
        ([], "FP32"),
        ([b""], "FP32"),
        ([b"\0" * 12], "FP16"),
    ],
    ids=["no contents", "shared memory", "half precision"],
)
def test_scores_that_are_not_in_the_answer(through_the_door: Serve, raw: Sequence[bytes], datatype: str) -> None:
    """Answers whose numbers are elsewhere, or no float32, are passed on, and counted as not compared."""
    triton = Triton()
    triton.raw, triton.datatype = raw, datatype

    async def ask(door: Door) -> Any:
        answer = (await door.infer()).get_response()
        return answer, await door.counts(dropped=1)

    answer, counts = through_the_door(ask, triton, wanted(SHADOW, share=1))
    assert (list(answer.raw_output_contents), answer.outputs[0].datatype) == (list(raw), datatype)
    assert (counts.compared, counts.agreed) == (0, 0)


def test_the_shadow_leaves_the_callers_memory_alone(through_the_door: Serve) -> None:
    """Where the caller wants its scores in shared memory the challenger is not asked: it would write over them."""
    triton = Triton()
    triton.raw = [b""]

    async def ask(door: Door) -> None:
        scores = InferRequestedOutput("scores")
        scores.set_shared_memory("callers", SCORES["tiny"].nbytes)
        await door.infer(outputs=[scores])
        await door.counts(champion_requests=1, challenger_requests=0, dropped=1)

    through_the_door(ask, triton, wanted(SHADOW, share=1))
    assert triton.asked == [("tiny", "")]


def test_the_champions_requests_are_those_that_it_answered(through_the_door: Serve) -> None:
    """One that failed is none of them, and does not make the mean time shorter."""
    triton = Triton()
    triton.failing = {"tiny": BROKEN}

    async def ask(door: Door) -> Any:
        await refused(door.infer())
        triton.failing = {}
        await door.infer()
        await door.tally.flush()
        return (await door.trials.get(TRIAL)).counts

    assert through_the_door(ask, triton, wanted(CANARY, share=1e-9)).champion_requests == 1


def test_the_tally_is_added_up_in_redis(through_the_door: Serve) -> None:
    """Counts are flushed once, and later ones are added."""

    async def ask(door: Door) -> Any:
        for requests in (1, 2):
            await door.infer()
            await door.tally.flush()
            await door.tally.flush()
            assert (await door.trials.get(TRIAL)).counts.challenger_requests == requests

    through_the_door(ask, trial=wanted(CANARY, share=1))
