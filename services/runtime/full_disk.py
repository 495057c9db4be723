"""Disks without room: what the operating system says of them becomes StoreFull."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from defuse.errors import StoreFull

# A quota and a file-size limit are full disks to the one who writes.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def naming_the_full_disk(
    where: str, what: str, *, remedy: str = "free space there and the work goes on"
) -> Iterator[None]:
    """Turn the refusal of a full disk into StoreFull that says where there is no room, for what, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull(f"{where} has no room for {what} ({error.strerror}); {remedy}") from error
