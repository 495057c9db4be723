"""Trials from their start to their end, as two gateways see them, over a real Redis and a real store."""

from typing import Any

import pytest
from defuse.errors import Conflict, InvalidInput, NotFound, NotReady
from defuse.v1 import correction_pb2, trial_pb2
from defuse.v1 import gateway_service_pb2 as pb

from services.gateway.records.paging import Cursor
from services.gateway.trials.trials import Trials
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.unit.gateway.trying import (
    CANDIDATE,
    CANDIDATE_VERSION,
    CORRECTION,
    TRIAL,
    Correction,
    Trial,
    finished,
    wanted,
    with_trials,
)

CANARY, SHADOW = Trial.MODE_CANARY, Trial.MODE_SHADOW


def kept(store: ArtifactStore, name: str = TRIAL) -> trial_pb2.Trial:
    return store.read_message(keys.trial(name), Trial)


async def listed(trials: Trials, model: str = "models/tiny") -> list[trial_pb2.Trial]:
    cursor = Cursor.of(pb.ListTrialsRequest(model=model), model)
    return list((await trials.page(model, cursor)).entries)


def refused(url: str, store: ArtifactStore, asked: trial_pb2.Trial, *corrections: correction_pb2.Correction) -> Any:
    """Ask for a trial that is refused; return the error, after nothing was found of it."""

    async def story(trials: Trials, _: Trials) -> Any:
        with pytest.raises((InvalidInput, NotReady, NotFound)) as caught:
            await trials.start(asked)
        assert await listed(trials) == list(await trials.running()) == []
        return caught.value

    return with_trials(url, store, story, *corrections)


def test_a_trial_begins_with_the_candidate_of_its_correction(redis_url: str, store: ArtifactStore) -> None:
    """It is running under a name of its own, and every gateway finds it."""

    async def story(trials: Trials, other: Trials) -> None:
        trial = await trials.start(wanted(share=0.2, reason="it helps"))
        assert (trial.name, trial.state) == (TRIAL, Trial.STATE_RUNNING)
        assert (trial.candidate, trial.candidate_version) == (CANDIDATE, CANDIDATE_VERSION)
        assert (trial.correction, trial.mode, trial.share) == (CORRECTION, CANARY, 0.2)
        assert (trial.actor, trial.reason) == ("ann", "it helps")
        found = [await other.get(TRIAL), *await listed(other), *await other.running()]
        assert [one.name for one in found] == [TRIAL] * 3
        assert found[0].create_time == trial.create_time

    with_trials(redis_url, store, story)


def test_a_trial_that_is_stopped_has_ended(redis_url: str, store: ArtifactStore) -> None:
    """No gateway draws for it any more, and stopping it once more changes nothing."""

    async def story(trials: Trials, other: Trials) -> None:
        await trials.start(wanted())
        ended = await other.stop(TRIAL)
        assert ended.state == Trial.STATE_ENDED
        assert ended.end_time.ToNanoseconds() > ended.create_time.ToNanoseconds()
        assert list(await trials.running()) == []
        assert await trials.stop(TRIAL) == ended == await trials.get(TRIAL)

    with_trials(redis_url, store, story)


def test_a_trial_is_in_the_store_at_its_start_and_at_its_end(redis_url: str, store: ArtifactStore) -> None:
    """The store has what Redis could lose: first that the trial runs, then its counts."""

    async def story(trials: Trials, _: Trials) -> None:
        started = await trials.start(wanted())
        assert kept(store) == started
        await trials.count(TRIAL, {"champion_requests": 5})
        ended = await trials.stop(TRIAL)
        assert kept(store) == ended
        assert (kept(store).state, kept(store).counts.champion_requests) == (Trial.STATE_ENDED, 5)

    with_trials(redis_url, store, story)


def test_one_trial_of_a_model_at_a_time(redis_url: str, store: ArtifactStore) -> None:
    """While one runs a second is refused by its name, also by another gateway; then it is numbered on."""

    async def story(trials: Trials, other: Trials) -> None:
        await trials.start(wanted())
        for one in (trials, other):
            with pytest.raises(Conflict, match=TRIAL):
                await one.start(wanted(SHADOW))
        await trials.stop(TRIAL)
        second = await other.start(wanted(SHADOW))
        assert second.name == "models/tiny/trials/t2"
        assert [one.name for one in await listed(trials)] == [TRIAL, second.name]
        assert [one.name for one in await trials.running()] == [second.name]

    with_trials(redis_url, store, story)


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1, float("nan")])
def test_a_share_out_of_bounds(redis_url: str, store: ArtifactStore, share: float) -> None:
    """Above 0 and at most 1: other shares are refused with the value."""
    error = refused(redis_url, store, wanted(share=share))
    assert isinstance(error, InvalidInput)
    assert (error.reason, f"the share is {share:g}" in error.message) == ("OUT_OF_BOUNDS", True)
    assert error.field == "trial.share"


def test_a_mode_is_needed(redis_url: str, store: ArtifactStore) -> None:
    """Whether callers get the challenger's answers is never guessed."""
    error = refused(redis_url, store, wanted(Trial.MODE_UNSPECIFIED))
    assert isinstance(error, InvalidInput)
    assert (error.reason, error.field) == ("BAD_MODE", "trial.mode")


@pytest.mark.parametrize(("correction", "kind"), [("c1", InvalidInput), ("runs/first/corrections/c9", NotFound)])
def test_a_correction_that_is_not_there(redis_url: str, store: ArtifactStore, correction: str, kind: type) -> None:
    """An unknown correction, and what is no name of one, are refused."""
    assert isinstance(refused(redis_url, store, wanted(correction=correction)), kind)


@pytest.mark.parametrize("state", [Correction.STATE_RUNNING, Correction.STATE_FAILED, Correction.STATE_CANCELLED])
def test_a_correction_without_a_candidate(
    redis_url: str, store: ArtifactStore, state: "Correction.State.ValueType"
) -> None:
    """One that is not finished, or did not succeed, has nothing to try, not even in a shadow."""
    correction = Correction(name=CORRECTION, model="models/tiny", base_version=1, state=state)
    error = refused(redis_url, store, wanted(SHADOW), correction)
    assert isinstance(error, NotReady)
    assert error.reason == "CORRECTION_NOT_FINISHED"


@pytest.mark.parametrize("who", [{}, {"approver": "bea"}, {"reason": "it must"}])
def test_a_canary_has_to_pass_the_gate(redis_url: str, store: ArtifactStore, who: dict[str, str]) -> None:
    """Without a verdict that is passed nobody answers callers, unless a person says so and says why."""
    error = refused(redis_url, store, wanted(**who), finished(passed=False))
    assert isinstance(error, NotReady)
    assert error.reason == "GATE_NOT_PASSED"


@pytest.mark.parametrize(
    ("mode", "who"), [(CANARY, {"approver": "bea", "reason": "it must"}), (SHADOW, {})], ids=["approved", "shadow"]
)
def test_what_may_begin_although_the_gate_is_not_passed(
    redis_url: str, store: ArtifactStore, mode: "Trial.Mode.ValueType", who: dict[str, str]
) -> None:
    """An approved canary begins and keeps who approved it; a shadow answers nobody and needs no approval."""

    async def story(trials: Trials, _: Trials) -> None:
        trial = await trials.start(wanted(mode, **who))
        assert trial.state == Trial.STATE_RUNNING
        assert {field: getattr(kept(store), field) for field in who} == who

    with_trials(redis_url, store, story, finished(passed=False))


def test_counts_of_all_gateways_add_up(redis_url: str, store: ArtifactStore) -> None:
    """Counts are sums over gateways, and a mean time is that of all requests, not the mean of two means."""

    async def story(trials: Trials, other: Trials) -> None:
        await trials.start(wanted(SHADOW))
        await trials.count(TRIAL, {"champion_requests": 3, "champion_seconds": 0.3, "compared": 8, "agreed": 7})
        await other.count(TRIAL, {"champion_requests": 1, "champion_seconds": 0.3, "compared": 2, "agreed": 1})
        await other.count(TRIAL, {"challenger_requests": 5, "challenger_errors": 1, "challenger_seconds": 0.2})
        await trials.count(TRIAL, {"dropped": 2})
        counts = (await trials.get(TRIAL)).counts
        assert (counts.champion_requests, counts.compared, counts.agreed, counts.dropped) == (4, 10, 8, 2)
        assert counts.champion_ms == pytest.approx(150)
        assert (counts.challenger_requests, counts.challenger_errors) == (5, 1)
        assert counts.challenger_ms == pytest.approx(50)
        assert [one.counts for one in await listed(other)] == [counts]

    with_trials(redis_url, store, story)


def test_a_trial_that_saw_nothing(redis_url: str, store: ArtifactStore) -> None:
    """Without a request, or with none that was answered, there is no time, and no division by zero."""

    async def story(trials: Trials, _: Trials) -> None:
        await trials.start(wanted())
        assert (await trials.get(TRIAL)).counts == trial_pb2.TrialCounts()
        await trials.count(TRIAL, {"challenger_requests": 2, "challenger_errors": 2})
        assert (await trials.get(TRIAL)).counts.challenger_ms == 0

    with_trials(redis_url, store, story)


def test_what_only_the_gateway_sets(redis_url: str, store: ArtifactStore) -> None:
    """Counts and an end that a caller sends with its wish are not those of the trial."""

    async def story(trials: Trials, _: Trials) -> None:
        trial = await trials.start(wanted(counts={"champion_requests": 77}, end_time={"seconds": 5}))
        for one in (trial, kept(store), await trials.get(TRIAL)):
            assert not one.HasField("end_time")
            assert one.counts.champion_requests == 0

    with_trials(redis_url, store, story)


def test_names_that_are_not_there(redis_url: str, store: ArtifactStore) -> None:
    """An unknown trial or model, and what is no name of a trial, are refused."""

    async def story(trials: Trials, _: Trials) -> None:
        for call in (trials.get, trials.stop):
            with pytest.raises(NotFound, match="no trial 't1'"):
                await call(TRIAL)
            with pytest.raises(InvalidInput, match="'t1' is not a resource name"):
                await call("t1")
        with pytest.raises(NotFound, match="no model 'huge'"):
            await listed(trials, "models/huge")

    with_trials(redis_url, store, story)
