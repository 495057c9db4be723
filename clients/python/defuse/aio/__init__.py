"""The client for programs with an event loop.

>>> from defuse.aio import Client
>>> async def main() -> None:  # doctest: +SKIP
...     async with Client() as client:
...         async for batch in client.failures("first"):
...             print(len(batch.failures))
"""

from defuse.aio.client import Client
from defuse.aio.latent_space import LatentSpace
from defuse.aio.operation import Operation

__all__ = ["Client", "LatentSpace", "Operation"]
