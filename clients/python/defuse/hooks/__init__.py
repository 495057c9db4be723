"""Monitoring hooks, which report inference traffic to a gateway in the background.

>>> import grpc >>> from defuse.hooks import Monitor >>> with Monitor() as monitor:  #
doctest: +SKIP ...     channel =
grpc.intercept_channel(grpc.insecure_channel("triton:8001"), monitor)
"""

from defuse.hooks.buffer import DeliveryCounts
from defuse.hooks.monitor import AioInterceptor, Monitor, watch
from defuse.hooks.observation import Observation

__all__ = ["AioInterceptor", "DeliveryCounts", "Monitor", "Observation", "watch"]
