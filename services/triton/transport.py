"""The transports that send batches to Triton.

They are gRPC and registered shared memory. Triton's errors are mapped here as well.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from defuse.errors import DefuseError, Internal, NotReady, Unavailable
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from services.arrays import Array

# Statuses of a Triton that starts, stops, or is absent.
_AWAY = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
# In answers about an unloaded version, whose status is UNAVAILABLE, too; never while one is reloaded.
_UNLOADED = "not at ready state"
_NO_REGION = "Unable to find shared memory region"


def is_away(error: InferenceServerException) -> bool:
    """Return whether an error comes from the connection instead of Triton.

    The request may be under way, or may never have arrived.
    """
    return error.status() in _AWAY and _UNLOADED not in error.message()


def is_unknown_region(error: InferenceServerException) -> bool:
    """Return whether Triton lost the request's shared memory by restarting."""
    return _NO_REGION in error.message()


def to_defuse_error(error: InferenceServerException, url: str) -> DefuseError:
    """Return the DefuseError for an error of the Triton at `url`."""
    text = error.message()
    if is_away(error):
        return Unavailable(
            f"Triton at {url} does not answer ({text}); start it or set DEFUSE_TRITON_URL",
            reason="TRITON_UNAVAILABLE",
        )
    if "not found" in text or "not ready" in text or _UNLOADED in text:
        return NotReady(
            f"Triton at {url} does not serve this model ({text}); load it, or name a version that is served",
            reason="MODEL_NOT_SERVED",
        )
    return Internal(f"Triton at {url} refused the request: {text}", reason="TRITON_REFUSED")


# A transport by name, or the fastest that works.
TransportSetting = Literal["auto", "grpc", "system-shared-memory", "cuda-shared-memory"]
AUTO: Final = "auto"
GRPC: Final = "grpc"
SYSTEM_SHARED_MEMORY: Final = "system-shared-memory"
CUDA_SHARED_MEMORY: Final = "cuda-shared-memory"


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return numpy's type for one of Triton's type names."""
    dtype: np.dtype[Any] = np.dtype(triton_to_np_dtype(datatype))
    return dtype


class TransportRefused(Exception):
    """Raised when a transport does not work here.

    The message has the reason and the remedy.
    """


@dataclass(frozen=True, kw_only=True)
class BufferSize:
    """The bytes of input and output that a request needs."""

    input_bytes: int
    output_bytes: int

    def holds(self, other: "BufferSize") -> bool:
        return self.input_bytes >= other.input_bytes and self.output_bytes >= other.output_bytes

    def joined(self, other: "BufferSize") -> "BufferSize":
        """Return the size that holds both sizes."""
        return BufferSize(
            input_bytes=max(self.input_bytes, other.input_bytes),
            output_bytes=max(self.output_bytes, other.output_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One inference request, without the images."""

    model_id: str
    version: int
    input_name: str
    datatype: str
    shape: tuple[int, ...]
    output_name: str
    output_bytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.datatype)

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def buffer_size(self) -> BufferSize:
        return BufferSize(input_bytes=self.input_bytes, output_bytes=self.output_bytes)


class Memory(Protocol):
    """Memory for the images of one request, and possibly its answer."""

    buffer_size: BufferSize

    def accept(self, images: Any) -> Any:
        """Return images in a form that can be assigned to `input`."""

    def input(self, request: Request) -> Any:
        """Return the request's input, to be written.

        It is a numpy array or a torch tensor on the memory itself.
        """

    def bind(self, request: Request, tensor: Any, output: Any) -> None:
        """Set the locations of images and answer in tritonclient's objects."""

    def read(self, request: Request, result: Any) -> Array:
        """Return the answer, which stays valid when the memory is reused."""

    def release(self) -> None:
        """Release the memory, which no request uses."""

    def abandon(self) -> None:
        """Release the memory once Triton no longer uses it.

        The request was abandoned, and Triton may still work on it.
        """


class Transport(Protocol):
    """A way to send images to Triton."""

    @property
    def name(self) -> str: ...

    def probe(self) -> None:
        """Raise TransportRefused when the transport is unusable.

        Raises Unavailable while Triton does not answer.
        """

    def memory(self, buffer_size: BufferSize) -> Memory:
        """Return memory for a request; raise as `probe` does."""

    def close(self) -> None:
        """Release abandoned memory that Triton no longer uses."""


class HostMemory:
    """Memory that numpy can address."""

    def __init__(self, buffer: Any, buffer_size: BufferSize) -> None:
        self.buffer_size = buffer_size
        self._buffer = buffer

    def accept(self, images: Any) -> Array:
        """Return images as a numpy array.

        Images on another device are copied through DLPack.
        """
        if isinstance(images, np.ndarray):
            return images
        from torch.utils import dlpack

        array: Array = dlpack.from_dlpack(images).cpu().numpy()
        return array

    def input(self, request: Request) -> Array:
        return np.ndarray(request.shape, request.dtype, buffer=self._buffer)


class PrivateMemory(HostMemory):
    """Memory of this process, which is copied into each request."""

    def bind(self, request: Request, tensor: Any, _: Any) -> None:
        tensor.set_data_from_numpy(self.input(request))

    def read(self, request: Request, result: Any) -> Array:
        array: Array = result.as_numpy(request.output_name)
        return array

    def release(self) -> None:
        """Do nothing, since the garbage collector frees the memory."""

    abandon = release


class Grpc:
    """The transport that sends images in the request, to any Triton."""

    name = GRPC

    def probe(self) -> None:
        """Do nothing, since this transport works with any Triton."""

    def memory(self, buffer_size: BufferSize) -> PrivateMemory:
        return PrivateMemory(np.empty(buffer_size.input_bytes, np.uint8), buffer_size)

    def close(self) -> None:
        """Do nothing, since this transport holds no memory at Triton."""


# Prefix of the services' region names; the process id follows, which tells an operator the owner.
OWN_REGION_PREFIX = "defuse-"
# Triton releases a request's memory a moment after its answer.
_LETTING_GO_S = 1.0
_POLL_S = 0.001


class SharedMemoryRegions:
    """Registers and unregisters regions of one kind.

    It is safe to use from several threads.
    """

    def __init__(self, url: str, *, register: Callable[..., None], unregister: Callable[[str], None]) -> None:
        self._url = url
        self._register = register
        self._unregister = unregister
        # Regions of abandoned requests, which may still run.
        self._leaving: deque[tuple[str, Callable[[], None]]] = deque()

    def add(self, name: str, *details: Any) -> None:
        """Register a region.

        Raises TransportRefused with Triton's message, or Unavailable while Triton does not answer.
        """
        self.remove_leaving()
        try:
            self._register(name, *details)
        except InferenceServerException as error:
            if is_away(error):
                raise to_defuse_error(error, self._url) from error
            raise TransportRefused(f"Triton at {self._url} does not take it ({error.message()})") from error

    def remove(self, name: str, free: Callable[[], None]) -> None:
        """Unregister and free an unused region."""
        deadline = time.monotonic() + _LETTING_GO_S
        while refusal := self._refusal(name, free):
            if is_away(refusal) or time.monotonic() > deadline:
                self.remove_later(name, free)
                return
            time.sleep(_POLL_S)

    def remove_later(self, name: str, free: Callable[[], None]) -> None:
        """Unregister and free a region once Triton releases it."""
        self._leaving.append((name, free))

    def remove_leaving(self) -> bool:
        """Unregister the regions that Triton has released.

        Returns whether Triton still uses some.
        """
        with suppress(IndexError):  # another thread may empty the deque
            for _ in range(len(self._leaving)):
                name, free = self._leaving.popleft()
                if refusal := self._refusal(name, free):
                    self.remove_later(name, free)
                    if is_away(refusal):
                        return False
        return bool(self._leaving)

    def close(self) -> None:
        """Unregister all regions that Triton releases soon.

        The next process finds the rest.
        """
        deadline = time.monotonic() + _LETTING_GO_S
        while self.remove_leaving() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _refusal(self, name: str, free: Callable[[], None]) -> InferenceServerException | None:
        """Unregister a region and free it.

        Returns the reason of a failure, or None.
        """
        try:
            self._unregister(name)
        except InferenceServerException as error:
            return error
        free()
        return None
