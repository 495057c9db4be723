"""What a client does, described without doing it: the same description is carried out by `Client` and `aio.Client`.

A call of the API is a generator that yields steps, is sent what they gave, and returns what its caller wants. What a
step raises is raised where it was yielded.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call:
    """Ask the gateway; gives its answer. `timeout_s` is None for a call that answers at once."""

    method: str
    # A message, or an iterator of messages.
    request: Any
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stream(Generic[T]):
    """Follow a stream to its end, connected again where it breaks off; gives what was read last, None without any.

    `read` may change the request, to say where it is when the stream is asked for again.
    """

    method: str
    request: Any
    read: Callable[[Any], T]
    # None follows for ever.
    timeout_s: float | None = None
    # What is done for a reader that stops before the end.
    abandoned: "Callable[[], Steps[Any]] | None" = None


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class User:
    """Gives in whose name something is said where no name is given; nothing where a token says it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Compute, or use the disk, for as long as it takes; gives what the function returns."""

    function: Callable[[], Any]


Step: TypeAlias = Call | Stream[Any] | Pause | User | Work
Steps: TypeAlias = Generator[Step, Any, T]
