"""Who hears of batches that were changed."""

from services.gateway.monitoring.config import Subject


async def nobody(subject: Subject, batch: str) -> None:
    """Hear of a batch, and do nothing about it."""
