"""Routing of requests by a gateway's view of the trials."""

import asyncio
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from defuse.errors import NotFound

from services.gateway.inference import routing
from services.gateway.inference.routing import Route, RoutingTable, Target, challenger_of
from services.gateway.trials.trials import LEASE_S, Trials
from services.storage.artifacts import ArtifactStore
from tests.unit.gateway.trying import CANDIDATE, CANDIDATE_VERSION, TRIAL, Trial, wanted, with_trials

CHALLENGER = Route(model=CANDIDATE, version=str(CANDIDATE_VERSION))


def target(model: str = "tiny", version: str = "", id_: str = "") -> Target:
    return Target(model=model, version=version, id=id_, end=0)


def routes(*shares: float, since: float = math.inf) -> RoutingTable:
    """Return routes that know of a trial for each share, of `tiny` and of `other`, since a time; for good."""
    found = RoutingTable(None)  # type: ignore[arg-type]  # what is under way is shown to it
    names = [TRIAL, "models/other/trials/t1"][: len(shares)]
    trials = [
        Trial(name=name, share=share, candidate=CANDIDATE, candidate_version=CANDIDATE_VERSION)
        for name, share in zip(names, shares, strict=True)
    ]
    found.show(trials, since=since)
    return found


@pytest.mark.parametrize("version", ["", "1", "17"])
def test_without_a_trial_requests_stay_as_they_are(version: str) -> None:
    """Model and version are what was asked for, and nothing is counted."""
    assert routes().route(target(version=version)) == Route(model="tiny", version=version)


def test_who_lost_sight_of_the_others_draws_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that has not heard for a while whether a trial goes on takes it to be over."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(routing, "time", clock)
    known = routes(1.0, since=clock.now)
    clock.now += LEASE_S - 0.01
    assert known.route(target()).drawn
    clock.now += 0.01
    assert known.route(target()) == Route(model="tiny")


def test_a_pinned_version_is_left_alone() -> None:
    """Requests with an explicit version take no part in a trial, even of all requests."""
    assert routes(1.0).route(target(version="1")) == Route(model="tiny", version="1")


def test_another_model_is_left_alone() -> None:
    """A trial draws requests to its own model, also where another one is tried too."""
    known = routes(1.0, 0.5)
    assert known.route(target("third")) == Route(model="third")
    assert [known.route(target(model)).trial.share for model in ("tiny", "other")] == [1.0, 0.5]  # type: ignore[union-attr]


@pytest.mark.parametrize("shares", [(), (1.0,)])
def test_the_champion_by_its_word(shares: tuple[float, ...]) -> None:
    """`champion` is the version that callers get, and no part of a trial."""
    assert routes(*shares).route(target(version="champion")) == Route(model="tiny")


def test_the_challenger_by_its_word() -> None:
    """`challenger` is the candidate where Triton serves it, at any share, and counts in no trial."""
    assert routes(1e-9).route(target(version="challenger")) == CHALLENGER
    assert challenger_of(Trial(candidate=CANDIDATE, candidate_version=CANDIDATE_VERSION)) == (CANDIDATE, "3")


def test_a_challenger_that_is_not_there() -> None:
    """Without a trial of the model there is none, which is said with what to ask for instead."""
    for known, model in ((routes(), "tiny"), (routes(1.0), "third")):
        with pytest.raises(NotFound, match=rf"'{model}' has no challenger.*'champion'") as caught:
            known.route(target(model, "challenger"))
        assert caught.value.reason == "NO_CHALLENGER"


def test_a_share_of_1_draws_everything() -> None:
    """With any id, and without one, a request is drawn."""
    known = routes(1.0)
    assert all(known.route(target(id_=id_)).drawn for id_ in ["", *map(str, range(500))])


def test_an_id_always_goes_the_same_way() -> None:
    """A request that is sent again is answered by the same version, by every gateway."""
    ids = [f"request-{number}" for number in range(200)]
    here, there = routes(0.5), routes(0.5)
    first = [here.route(target(id_=id_)).drawn for id_ in ids]
    assert [there.route(target(id_=id_)).drawn for id_ in ids] == first
    assert {True, False} == set(first)


def test_who_is_drawn_stays_drawn_as_the_share_grows() -> None:
    """A larger share adds ids and takes none away."""
    few, many = routes(0.1), routes(0.4)
    drawn = [id_ for id_ in map(str, range(500)) if few.route(target(id_=id_)).drawn]
    assert drawn
    assert all(many.route(target(id_=id_)).drawn for id_ in drawn)


@pytest.mark.parametrize("name", [str, lambda _: ""], ids=["ids", "no id"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.9])
def test_about_the_share_is_drawn(share: float, name: Callable[[int], str]) -> None:
    """Of many requests, with ids or without, the share is drawn; all of them count in the trial."""
    known = routes(share)
    found = [known.route(target(id_=name(number))) for number in range(5000)]
    assert sum(route.drawn for route in found) / len(found) == pytest.approx(share, abs=0.035)  # five deviations
    assert {(route.model, route.version, route.trial is not None) for route in found} == {("tiny", "", True)}


def test_a_gateway_learns_of_trials_that_another_one_starts(redis_url: str, store: ArtifactStore) -> None:
    """It draws soon after the start, and when the stop has returned it draws no more."""

    async def story(trials: Trials, other: Trials) -> None:
        known = RoutingTable(other)
        keeping_up = asyncio.create_task(known.run())
        try:
            assert known.route(target()).trial is None
            await trials.start(wanted(share=1.0))
            while not known.route(target()).drawn:
                await asyncio.sleep(0.02)
            assert known.route(target(version="challenger")) == CHALLENGER
            await trials.stop(TRIAL)
            assert known.route(target()) == Route(model="tiny")
        finally:
            while not keeping_up.done():  # redis-py can swallow a cancellation
                keeping_up.cancel()
                await asyncio.wait([keeping_up], timeout=0.5)

    with_trials(redis_url, store, story)
