"""Who hears of batches that were changed."""

from services.gateway.monitoring.config import MonitoredModel


async def nobody(subject: MonitoredModel, batch: str) -> None:
    """Hear of a batch, and do nothing about it."""
