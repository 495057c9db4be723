"""CUDA shared memory, with which decoded images never leave the device.

Answers are sent in the reply, because a few numbers for each image are not worth a second region.
"""

import os
import uuid
from typing import Any

import numpy as np

from services.arrays import Array
from services.triton.transport import (
    CUDA_SHARED_MEMORY,
    OWN_REGION_PREFIX,
    BufferSize,
    Request,
    SharedMemoryRegions,
    TransportRefused,
)

_TRIAL = BufferSize(input_bytes=4096, output_bytes=0)


class CudaSharedMemory:
    """The transport for a CUDA device that torch and Triton share.

    It needs the package `cuda-python`.
    """

    name = CUDA_SHARED_MEMORY

    def __init__(self, client: Any, url: str, *, timeout_s: float) -> None:
        self._regions = SharedMemoryRegions(
            url,
            register=lambda name, handle, device, size: client.register_cuda_shared_memory(
                name, handle, device, size, client_timeout=timeout_s
            ),
            unregister=lambda name: client.unregister_cuda_shared_memory(name, client_timeout=timeout_s),
        )

    def probe(self) -> None:
        self.memory(_TRIAL).release()

    def memory(self, buffer_size: BufferSize) -> "CudaMemory":
        region = CudaRegion(buffer_size.input_bytes)
        try:
            self._regions.add(region.name, region.handle(), region.device, region.size)
        except BaseException:
            region.free()
            raise
        return CudaMemory(region, buffer_size, self._regions)

    def close(self) -> None:
        self._regions.close()


class CudaRegion:
    """Memory of the current CUDA device, as tritonclient allocates it."""

    def __init__(self, size: int) -> None:
        self._library = _library()
        import torch

        self.name = f"{OWN_REGION_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.size = size
        self.device = torch.cuda.current_device()
        try:
            self._region = self._library.create_shared_memory_region(self.name, size, self.device)
        except self._library.CudaSharedMemoryException as error:
            raise TransportRefused(f"{size} bytes cannot be had on CUDA device {self.device} ({error})") from error

    def handle(self) -> bytes:
        """Return the handle with which another process opens the memory."""
        handle: bytes = self._library.get_raw_handle(self._region)
        return handle

    def tensor(self) -> Any:
        """Return all bytes as a torch tensor on the memory itself."""
        from torch.utils import dlpack

        return dlpack.from_dlpack(self._library.as_shared_memory_tensor(self._region, "UINT8", [self.size]))

    def free(self) -> None:
        self._library.destroy_shared_memory_region(self._region)
        del self._region  # the library frees the memory with the last reference


class CudaMemory:
    """A region that holds the input of a request."""

    def __init__(self, region: CudaRegion, buffer_size: BufferSize, regions: SharedMemoryRegions) -> None:
        self.buffer_size = buffer_size
        self._region = region
        self._regions = regions

    def accept(self, images: Any) -> Any:
        """Return images as a torch tensor on the device.

        Images of other libraries are converted through DLPack.
        """
        import torch
        from torch.utils import dlpack

        # Not through DLPack, which accepts no read-only array.
        tensor = torch.as_tensor(images) if isinstance(images, np.ndarray) else dlpack.from_dlpack(images)
        return tensor.to(f"cuda:{self._region.device}")

    def input(self, request: Request) -> Any:
        import torch

        dtype = torch.from_numpy(np.empty(0, request.dtype)).dtype
        return self._region.tensor()[: request.input_bytes].view(dtype).view(request.shape)

    def bind(self, request: Request, tensor: Any, _: Any) -> None:
        import torch

        torch.cuda.current_stream(self._region.device).synchronize()  # Triton knows nothing of our streams
        tensor.set_shared_memory(self._region.name, request.input_bytes)

    def read(self, request: Request, result: Any) -> Array:
        array: Array = result.as_numpy(request.output_name)
        return array

    def release(self) -> None:
        self._regions.remove(self._region.name, self._region.free)

    def abandon(self) -> None:
        self._regions.remove_later(self._region.name, self._region.free)


def _library() -> Any:
    try:
        from tritonclient.utils import cuda_shared_memory
    except (ImportError, RuntimeError) as error:  # the library turns a missing package into a RuntimeError
        raise TransportRefused("the package cuda-python is missing; pip install cuda-python") from error
    # Deferred: torch takes seconds to import, and not every service needs it.
    import torch

    if not torch.cuda.is_available():
        raise TransportRefused("torch sees no CUDA device; it takes a GPU and a CUDA build of torch")
    return cuda_shared_memory
