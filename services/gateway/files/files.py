"""Uploaded files, stored by content: equal files are stored once."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator

from defuse.errors import InvalidInput, NotFound
from defuse.v1 import gateway_service_pb2

from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Files:
    """Receives and finds uploaded files."""

    def __init__(self, store: ArtifactStore, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def upload(self, messages: AsyncIterator[gateway_service_pb2.UploadFileRequest]) -> tuple[str, int]:
        """Store the file that a stream of messages carries.

        Returns its digest and its size in bytes.
        """
        first = await anext(aiter(messages), None)
        if first is None:
            raise InvalidInput(
                "the upload has no messages; send the digest and the content", reason="EMPTY_UPLOAD", field="digest"
            )

        async def chunks() -> AsyncIterator[bytes]:
            yield first.chunk
            async for message in messages:
                yield message.chunk

        return first.digest, await self.receive(first.digest, chunks())

    async def receive(self, digest: str, chunks: AsyncIterator[bytes]) -> int:
        """Store a file and return its size in bytes.

        Raises InvalidInput, and stores nothing, when the content has another digest or is too large.
        """
        key = keys.file(_checked_digest(digest))
        if await asyncio.to_thread(self._store.exists, key):
            return await asyncio.to_thread(self._store.size, key)
        content, size = hashlib.sha256(), 0
        with self._store.writing(key) as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._max_bytes:
                    raise InvalidInput(
                        f"the file is larger than {self._max_bytes} bytes, the limit", reason="TOO_LARGE", field="chunk"
                    )
                content.update(chunk)
                telemetry.UPLOADED_BYTES.inc(len(chunk))
                await asyncio.to_thread(file.write, chunk)
            if content.hexdigest() != digest:
                raise InvalidInput(
                    f"the file that arrived has digest {content.hexdigest()}, not {digest}; send it again",
                    reason="DIGEST_MISMATCH",
                    field="digest",
                )
        return size

    def size(self, digest: str) -> int:
        """Return the size of a stored file in bytes.

        Raises NotFound when the file was not uploaded.
        """
        key = keys.file(_checked_digest(digest))
        if not self._store.exists(key):
            raise NotFound(f"no file {digest} was uploaded", reason="FILE_NOT_FOUND")
        return self._store.size(key)


def _checked_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"{digest!r} is no SHA-256 in hexadecimal", reason="BAD_DIGEST")
    return digest
