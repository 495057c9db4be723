"""Which fields of a resource a caller wants (AIP-157)."""

from typing import Any, Generic, TypeVar

from defuse.errors import InvalidInput
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

R = TypeVar("R", bound=Message)


class ReadMask(Generic[R]):
    """Lets the named fields through; all of them where none is named.

    Raises InvalidInput that names a field which the resource does not have.
    """

    def __init__(self, kind: type[R], mask: FieldMask) -> None:
        self._kind = kind
        self._mask = mask
        descriptor: Any = kind.DESCRIPTOR
        for path in mask.paths:
            if not FieldMask(paths=[path]).IsValidForDescriptor(descriptor):
                known = ", ".join(field.name for field in descriptor.fields)
                raise InvalidInput(
                    f"read_mask names {path!r}, which a {descriptor.name} does not have; its fields are {known}",
                    reason="UNKNOWN_FIELD",
                )

    def of(self, message: R) -> R:
        """Return what a caller is sent of a message."""
        if not self._mask.paths:
            return message
        kept = self._kind()
        self._mask.MergeMessage(message, kept)
        return kept
