"""Hooks that show a gateway what a classifier answers in production, and cost its callers next to nothing.

>>> import grpc
>>> from defuse.hooks import Monitor
>>> with Monitor() as monitor:  # doctest: +SKIP
...     channel = grpc.intercept_channel(grpc.insecure_channel("triton:8001"), monitor)
"""

from defuse.hooks.aio import AioInterceptor
from defuse.hooks.counts import Counts
from defuse.hooks.monitor import Monitor
from defuse.hooks.observation import Observation
from defuse.hooks.triton import watch

__all__ = ["AioInterceptor", "Counts", "Monitor", "Observation", "watch"]
