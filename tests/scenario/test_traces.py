"""One trace of a run: from the client's call through the gateway, the queue and the services to Triton."""

from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_span_id, format_trace_id

from tests.collector import Span
from tests.conftest import Stack, eventually
from tests.scenario.conftest import RUN_TIMEOUT_S, SEARCH

RUN = "traced"


def test_a_run_is_one_trace(local_stack: Stack, undisturbed: Any) -> None:
    """Every stage is in it, below the caller's span, and so are the requests to Triton that it made."""
    collector = local_stack.traces
    assert collector
    with local_stack.client() as client, TracerProvider().get_tracer("test").start_as_current_span("caller") as caller:
        client.create_run(
            RUN,
            model=undisturbed["model"],
            dataset=undisturbed["dataset"],
            vae={"epochs": int(SEARCH[1])},
            search={"draws_per_source": 4, "max_sources": 256, "rendering": "decoder"},
            mixture={"kind": "plain", "max_components": 1, "min_support": 2},
        )
        assert client.wait_for_run(RUN, timeout_s=RUN_TIMEOUT_S).state == "succeeded"
    trace = format_trace_id(caller.get_span_context().trace_id)
    root = format_span_id(caller.get_span_context().span_id)
    stages = {"handle prepare", "handle identify", "handle distill"}

    def is_whole(spans: list[Span]) -> bool:
        """Say whether all stages are there and no span's parent is missing; each service sends when it pleases."""
        return stages <= {span.name for span in spans} and {span.parent for span in spans} <= {
            root,
            *(span.id for span in spans),
        }

    spans: list[Span] = []

    def came() -> bool:
        spans[:] = collector.of_trace(trace)
        return is_whole(spans)

    eventually(came)
    assert {span.service for span in spans} == {"defuse-gateway", "defuse-generator", "defuse-distiller"}
    by_id = {span.id: span for span in spans}
    handled = [span for span in spans if span.name in stages]
    assert {span.attributes["subject"] for span in handled} == {f"runs/{RUN}"}
    assert all("shard" in span.attributes for span in handled if span.name == "handle identify")
    requests = [span for span in spans if span.name == "triton infer"]
    assert {by_id[span.parent].name for span in requests} >= stages
