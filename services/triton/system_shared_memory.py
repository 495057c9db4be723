"""System shared memory: batches in files of /dev/shm, which Triton maps.

Triton must run on this host. The library's own `tritonclient.utils.shared_memory` is
not used for two reasons: it relies on `multiprocessing.shared_memory`, whose tracker
process unlinks files that others still use, and it reserves nothing, so that a full
/dev/shm is a SIGBUS.
"""

import fcntl
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException

from services.arrays import Array
from services.runtime import telemetry
from services.triton.transport import (
    OWN_REGION_PREFIX,
    SYSTEM_SHARED_MEMORY,
    BufferSize,
    HostMemory,
    Request,
    SharedMemoryRegions,
    TransportRefused,
    dtype_of,
)

DIRECTORY = Path("/dev/shm")  # noqa: S108  # where Triton's shm_open looks
_TRIAL = BufferSize(input_bytes=mmap.PAGESIZE, output_bytes=mmap.PAGESIZE)
# Regions grow by at least an eighth, so that slowly growing batches do not each register a new one.
_LEAST_STEP_BITS = 16
_STEPS_PER_DOUBLING_BITS = 3


class SystemSharedMemory:
    """The transport for a Triton on this host.

    Images are written where Triton reads them, and answers are read where it writes them.
    """

    name = SYSTEM_SHARED_MEMORY

    def __init__(self, client: Any, url: str, *, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._regions = SharedMemoryRegions(
            url,
            register=lambda name, size: client.register_system_shared_memory(
                name, f"/{name}", size, client_timeout=timeout_s
            ),
            unregister=lambda name: client.unregister_system_shared_memory(name, client_timeout=timeout_s),
        )

    def probe(self) -> None:
        """Register a small region; then remove the files of dead processes."""
        self.memory(_TRIAL).release()
        remove_orphans()
        with suppress(InferenceServerException):  # the next process tries again
            self._unregister_orphans()

    def memory(self, buffer_size: BufferSize) -> "SystemMemory":
        buffer_size = BufferSize(
            input_bytes=_rounded_size(buffer_size.input_bytes), output_bytes=_rounded_size(buffer_size.output_bytes)
        )
        size = buffer_size.input_bytes + buffer_size.output_bytes
        try:
            file = RegionFile(size)
        except OSError as error:
            raise TransportRefused(
                f"{size} bytes cannot be had in {DIRECTORY} ({error.strerror}); enlarge it (Docker: --shm-size)"
            ) from error
        try:
            self._regions.add(file.name, size)
        except BaseException as error:
            file.remove()
            if isinstance(error, TransportRefused):
                raise TransportRefused(
                    f"{error}; run it on this host with the same {DIRECTORY} (Docker: --ipc=host)"
                ) from error
            raise
        return SystemMemory(file, buffer_size, self._regions)

    def close(self) -> None:
        self._regions.close()

    def _unregister_orphans(self) -> None:
        """Unregister regions without a file in the shared /dev/shm.

        The regions of living processes always have one.
        """
        known = self._client.get_system_shared_memory_status(client_timeout=self._timeout_s).regions
        for name in known:
            if name.startswith(OWN_REGION_PREFIX) and not (DIRECTORY / name).exists():
                self._regions.remove(name, lambda: None)


class SystemMemory(HostMemory):
    """A region that holds the input of a request, then the output."""

    def __init__(self, file: "RegionFile", buffer_size: BufferSize, regions: SharedMemoryRegions) -> None:
        super().__init__(file.buffer, buffer_size)
        self._file = file
        self._regions = regions

    def bind(self, request: Request, tensor: Any, output: Any) -> None:
        tensor.set_shared_memory(self._file.name, request.input_bytes)
        if request.output_bytes:
            output.set_shared_memory(self._file.name, request.output_bytes, self.buffer_size.input_bytes)

    def read(self, request: Request, result: Any) -> Array:
        if any(result.get_response().raw_output_contents):  # no space was requested, or the server does not support it
            array: Array = result.as_numpy(request.output_name)
            return array
        answer = result.get_output(request.output_name)
        dtype, offset = dtype_of(answer.datatype), self.buffer_size.input_bytes
        view: Array = np.ndarray(tuple(answer.shape), dtype, buffer=self._buffer, offset=offset)
        return view.copy()

    def release(self) -> None:
        self._regions.remove(self._file.name, lambda: None)
        self._file.remove()

    def abandon(self) -> None:
        self._regions.remove_later(self._file.name, lambda: None)
        self._file.remove()


class RegionFile:
    """A uniquely named file in /dev/shm, locked by its process.

    Names are never reused, because Triton remembers the closed descriptor of a key that it has mapped.
    """

    def __init__(self, size: int) -> None:
        self.name = f"{OWN_REGION_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._file = os.fdopen(os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR, 0o600), "r+b", buffering=0)
        try:
            # Locked and reserved before it has a name: nobody takes it for an orphan, and a failure leaves nothing
            # behind.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.posix_fallocate(self._file.fileno(), 0, size)
            self.buffer = mmap.mmap(self._file.fileno(), size)
            # With a directory descriptor Python calls linkat, which follows the link in /proc; link would not.
            source = f"/proc/self/fd/{self._file.fileno()}"
            os.link(source, DIRECTORY / self.name, src_dir_fd=self._file.fileno())
        except BaseException:
            self._file.close()
            raise

    def remove(self) -> None:
        """Remove the file's name and lock.

        The mapping stays as long as an array refers to it.
        """
        (DIRECTORY / self.name).unlink(missing_ok=True)
        self._file.close()


def remove_orphans() -> None:
    """Remove the files of killed processes.

    They are found by lock rather than by the process id in the name, because containers that share /dev/shm do not
    share process ids.
    """
    names = []
    for path in DIRECTORY.glob(f"{OWN_REGION_PREFIX}*"):
        with suppress(OSError), _locked(path):  # another process's file: alive, or removed meanwhile
            path.unlink()
            names.append(path.name)
    if names:
        telemetry.log().info("shared_memory_orphans_removed", names=names)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _rounded_size(size: int) -> int:
    step = 1 << max(_LEAST_STEP_BITS, size.bit_length() - _STEPS_PER_DOUBLING_BITS)
    return -(-size // step) * step
