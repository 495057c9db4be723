from defuse.v1 import work_pb2

from services.gateway.events import _event_key
from services.runtime import catalog
from tests.unit.gateway.stories import ADAPTIVE, CANCELLED, NAME, Run, failed, identified, planned, progress


def test_every_event_of_a_run_has_a_place_of_its_own() -> None:
    """No event of a run is recorded over another one, however many shards and rounds there are."""
    keys = [_event_key(event) for event in [*ADAPTIVE, CANCELLED, failed("x")]]
    assert len(set(keys)) == len(ADAPTIVE) + 2


def test_the_same_event_has_the_same_place() -> None:
    """What is delivered twice is recorded once."""
    assert _event_key(identified(3, 2, failures=1)) == _event_key(identified(3, 2, failures=1))
    assert _event_key(planned(2, 40)) == _event_key(planned(2, 40))


def test_the_ends_lie_where_others_look_for_them() -> None:
    """Whoever follows a run finds its failure and its cancellation by their kind."""
    assert _event_key(failed("x")) == catalog.event(NAME, "failed")
    assert _event_key(CANCELLED) == catalog.event(NAME, "cancelled")


def test_progress_is_not_recorded() -> None:
    """Progress, and an event of nobody, leave nothing behind."""
    assert _event_key(progress(Run.STATE_PREPARING, 0.5)) is None
    assert _event_key(work_pb2.Event(failed=work_pb2.StageFailed())) is None
