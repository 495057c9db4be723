"""`python -m services.runtime.dead_letters [replay STREAM]`: the dead letters.

The command lists the dead letters, or replays those of a stream.
"""

import argparse
import asyncio
import sys

from defuse.errors import DefuseError

from services.runtime.queue import (
    CHOOSE,
    DISTILL,
    EVENTS,
    IDENTIFY,
    KEY,
    PLAN,
    PREPARE,
    PUBLISH,
    REDIS_AWAY,
    TRAIN,
    WATCH,
    Queue,
)
from services.runtime.settings import Settings

_STREAMS = (PREPARE, PLAN, IDENTIFY, DISTILL, WATCH, TRAIN, CHOOSE, PUBLISH, EVENTS)
_STAGES = [stream.rpartition(":")[2] for stream in _STREAMS]


def main() -> None:
    """List or replay dead letters, as the arguments say.

    Exits with status 1 and a one-line error message when Redis does not answer.
    """
    parser = argparse.ArgumentParser(prog="python -m services.runtime.dead_letters", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["list", "replay"], default="list")
    parser.add_argument("stream", nargs="?", choices=_STAGES, help="stream whose dead letters are replayed")
    arguments = parser.parse_args()
    if (arguments.what == "replay") is not bool(arguments.stream):
        parser.error("replay takes a stream, list takes none")
    try:
        asyncio.run(_act(Settings.load(), arguments.stream))
    except (DefuseError, *REDIS_AWAY) as error:
        sys.exit(f"defuse: {error}")


async def _act(settings: Settings, replayed: str | None) -> None:
    queue = Queue(settings.redis_url, timeout_s=settings.dependency_timeout_s)
    try:
        await queue.check()
        if replayed:
            count = await queue.replay(f"{KEY}stream:{replayed}")
            sys.stdout.write(f"{count} put back on {replayed}\n")
        else:
            for stage, stream in zip(_STAGES, _STREAMS, strict=True):
                for letter_id, error in await queue.dead(stream):
                    sys.stdout.write(f"{stage}\t{letter_id}\t{error}\n")
    finally:
        await queue.close()


if __name__ == "__main__":
    main()
