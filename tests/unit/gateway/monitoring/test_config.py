"""How a model's traffic is watched, as it is said and as it is kept."""

from datetime import timedelta
from typing import Any

import pytest
from defuse.errors import InvalidInput
from defuse.v1 import monitor_pb2

from services.gateway.monitoring import config
from services.storage import keys
from services.storage.artifacts import ArtifactStore

Config = monitor_pb2.MonitorConfig


def test_what_is_left_out_takes_its_default(store: ArtifactStore) -> None:
    """Also of a model of which nobody has said anything."""
    whole = config.complete(Config())
    assert (whole.expected_run_length, whole.keep) == (100_000, Config.KEEP_IMAGES)
    assert config.retention(whole) == timedelta(days=7)
    assert config.read_config(store, "models/tiny") == whole


def test_what_is_said_is_kept(store: ArtifactStore) -> None:
    """Nothing of it is changed."""
    said = Config(
        expected_run_length=1000,
        retention={"seconds": 3600},
        keep=Config.KEEP_LATENTS,
        webhook_url="https://example.org/alerts?key=1",
        start_runs=True,
    )
    assert config.complete(said) == said
    store.write_message(keys.monitor_config("models/tiny"), said)
    assert config.read_config(store, "models/tiny") == said


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"expected_run_length": 99}, "expected_run_length"),
        ({"expected_run_length": float("nan")}, "expected_run_length"),
        ({"retention": {}}, "retention"),
        ({"retention": {"seconds": -5}}, "retention"),
        ({"retention": {"seconds": 3651 * 86400}}, "retention"),
        ({"keep": 9}, "keep"),
        ({"webhook_url": "file:///etc/passwd"}, "webhook_url"),
        ({"webhook_url": "http://"}, "webhook_url"),
        ({"webhook_url": "http://[::1"}, "webhook_url"),
        ({"webhook_url": f"http://host/{'x' * 2048}"}, "webhook_url"),
    ],
)
def test_what_is_out_of_bounds(said: dict[str, Any], field: str) -> None:
    """It is named."""
    with pytest.raises(InvalidInput) as refused:
        config.complete(Config(**said))
    assert refused.value.field == f"config.{field}"
