"""Count a run's failures as they are found, on an event loop."""

import asyncio

from defuse.aio import Client


async def main() -> None:
    """Follow the run `first` to the end of its search."""
    async with Client() as client:
        async for batch in client.failures("first"):
            print(len(batch.failures), "more failures; goes on from", batch.resume_token)


asyncio.run(main())
