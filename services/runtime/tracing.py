"""Traces: spans of calls, messages and requests to Triton.

The context is W3C Trace Context. Spans are created and propagated only while an exporter is configured.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from defuse.errors import NotReady
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

_TRACER = trace.get_tracer("defuse")
_exporting = False


@contextmanager
def export_spans(service: str, url: str | None) -> Iterator[None]:
    """Export the spans of this process while the block runs.

    Without a URL no spans are created. Raises NotReady when the packages for it are missing.
    """
    global _exporting  # noqa: PLW0603  # OpenTelemetry has one provider a process, too
    if not url:
        yield
        return
    provider = _provider(service, url)
    trace.set_tracer_provider(provider)
    _exporting = True
    try:
        yield
    finally:
        provider.shutdown()


def server_interceptors() -> list[Any]:
    """Return the interceptors that trace incoming calls, except health checks."""
    if not _exporting:
        return []
    from opentelemetry.instrumentation import grpc as instrumented
    from opentelemetry.instrumentation.grpc.filters import health_check, negate

    return [instrumented.aio_server_interceptor(filter_=negate(health_check()))]  # type: ignore[no-untyped-call]


def client_interceptors() -> list[Any]:
    """Return the interceptors that trace outgoing calls and propagate the context."""
    if not _exporting:
        return []
    from opentelemetry.instrumentation import grpc as instrumented

    return list(instrumented.aio_client_interceptors())  # type: ignore[no-untyped-call]


def current_trace_context() -> dict[str, str]:
    """Return the present context as headers, empty without one."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


@contextmanager
def message_span(stage: str, carrier: Mapping[str, str], **attributes: Any) -> Iterator[None]:
    """Handle a message in its own span and trace context."""
    with _TRACER.start_as_current_span(
        f"handle {stage}", propagate.extract(carrier), kind=SpanKind.CONSUMER, attributes=attributes
    ):
        yield


def set_outcome(outcome: str, *, failed: bool) -> None:
    """Set the outcome of the message on the present span."""
    span = trace.get_current_span()
    span.set_attribute("outcome", outcome)
    if failed:
        span.set_status(Status(StatusCode.ERROR, outcome))


def start_request_span(name: str, **attributes: Any) -> Span:
    """Start a span below the present one, if there is one.

    `end_span` ends it.
    """
    if not trace.get_current_span().get_span_context().is_valid:
        return trace.INVALID_SPAN
    return _TRACER.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)


def end_span(span: Span, error: BaseException | None = None) -> None:
    """End a span of `start_request_span`, with an error if there is one."""
    if error:
        span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end()


@contextmanager
def end_span_on_error(span: Span) -> Iterator[None]:
    """End a span of `start_request_span` when the block raises.

    Otherwise later code ends it.
    """
    try:
        yield
    except BaseException as error:
        end_span(span, error)
        raise


def propagation_headers(span: Span) -> dict[str, str]:
    """Return the headers that make a request part of a span's trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span))
    return carrier


def trace_ids() -> dict[str, str]:
    """Return the ids of the present trace and span, for logs.

    The result is empty without a span.
    """
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def _provider(service: str, url: str) -> Any:
    try:
        import opentelemetry.instrumentation.grpc  # noqa: F401
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise NotReady(
            "DEFUSE_OTLP_URL is set, but the packages for traces are missing: pip install 'defuse-ml[tracing]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"defuse-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, insecure=url.startswith("http://"))))
    return provider
