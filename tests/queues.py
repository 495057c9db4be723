"""Queues in tests."""

import asyncio

from services.runtime.queue import Queue


async def close_queues(*queues: Queue) -> None:
    """End all other tasks of the event loop, then close the queues.

    A cancelled task that is still connecting would connect after the close, and nothing would close that connection.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for queue in queues:
        await queue.close()
