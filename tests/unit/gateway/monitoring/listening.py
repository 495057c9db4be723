"""A listener for changed batches."""

from services.gateway.monitoring.config import MonitoredModel


async def nobody(subject: MonitoredModel, batch: str) -> None:
    """Hear of a batch, and do nothing about it."""
