"""Which hours are past their retention."""

from datetime import UTC, datetime, timedelta

from services.gateway.monitoring.observation_changes import expired_hours

NOW = datetime(2026, 11, 26, 14, 30, tzinfo=UTC)


def test_an_hour_goes_when_its_last_moment_is_old() -> None:
    """Not earlier: observations of an hour's end are kept as long as the rest."""
    hours = [f"models/tiny/observations/2026-11-26-{hour:02d}" for hour in (10, 11, 12, 13, 14)]
    assert list(expired_hours(hours, timedelta(hours=2), NOW)) == hours[:2]
    assert list(expired_hours(hours, timedelta(hours=2), NOW - timedelta(minutes=30))) == hours[:1]
