"""Logs as structured events, and Prometheus metrics on a port."""

import logging
import sys
from typing import Any

import prometheus_client
import structlog

from services.runtime import tracing

RPC_SECONDS = prometheus_client.Histogram(
    "defuse_rpc_seconds",
    "Time to answer a call.",
    ["method", "code"],
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60),
)
MESSAGES = prometheus_client.Counter("defuse_messages_total", "Messages handled.", ["stream", "outcome"])
MESSAGE_SECONDS = prometheus_client.Histogram(
    "defuse_message_seconds", "Time to handle a message.", ["stream"], buckets=(0.01, 0.1, 1, 10, 60, 600)
)
BACKLOG = prometheus_client.Gauge("defuse_queue_backlog", "Messages not yet acknowledged.", ["stream"])
PENDING = prometheus_client.Gauge("defuse_queue_pending", "Messages delivered and not yet acknowledged.", ["stream"])
OLDEST = prometheus_client.Gauge(
    "defuse_queue_oldest_seconds", "Age of the oldest message not yet acknowledged; 0 without one.", ["stream"]
)
DEPENDENCY_UP = prometheus_client.Gauge(
    "defuse_dependency_up", "1 while the dependency answers, else 0.", ["dependency"]
)
DEAD = prometheus_client.Gauge("defuse_queue_dead", "Messages given up after their last delivery.", ["stream"])
DECODES = prometheus_client.Counter("defuse_decodes_total", "Perturbations decoded and classified.")
FAILURES = prometheus_client.Counter("defuse_failures_total", "Failures stored.")
TRIALS = prometheus_client.Counter("defuse_trials_total", "What trials on live requests have seen.", ["trial", "seen"])
OBSERVATIONS = prometheus_client.Counter(
    "defuse_observations_total", "Reported observations, by outcome.", ["model", "outcome"]
)
REGION_HITS = prometheus_client.Counter(
    "defuse_region_hits_total", "Observed images inside of a known region.", ["model", "region"]
)
ALERTS = prometheus_client.Counter("defuse_alerts_total", "Alerts that were raised.", ["model", "kind"])
WEBHOOKS = prometheus_client.Counter("defuse_webhooks_total", "Alerts for webhooks, by outcome.", ["outcome"])
UPLOADED_BYTES = prometheus_client.Counter("defuse_uploaded_bytes_total", "Bytes of files received from clients.")


def configure_logging(service: str, *, level: str, log_format: str) -> None:
    """Write structured events of this process to standard error."""
    renderer: Any = structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            lambda _logger, _method, event: {**event, **tracing.trace_ids()},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def log() -> structlog.typing.FilteringBoundLogger:
    """Return the logger of this process."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def start_metrics_server(host: str, port: int) -> tuple[Any, int]:
    """Serve the metrics, and return the server and its port.

    The server is returned for its shutdown.
    """
    server, _ = prometheus_client.start_http_server(port, addr=host)
    return server, server.server_port
