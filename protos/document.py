"""Write docs/reference/api.md from the protos and the examples: `python -m protos.document`.

The comments in the protos are the descriptions of calls, messages and fields.
"""

import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

from protos.generate import PROTOS, compile_protos

DOCS = PROTOS.parent / "docs"
PAGE = DOCS / "reference" / "api.md"
EXAMPLES = DOCS / "examples"
# The public services; None: with all calls.
SERVICES: Mapping[str, set[str] | None] = {
    "GatewayService": None,
    "MonitorService": None,
    "GeneratorService": {"Identify", "Encode", "Decode", "Interpolate"},
}
_PACKAGE = ".defuse.v1."
_WIDTH = 120
_INTRODUCTION = """# API

For developers who call the gateway from a program of their own, in any language.

`python -m protos.document` writes this page from the comments in `protos/`. Change it there.

The gateway answers all of these calls over gRPC on one port, with reflection and health. Packages and message names are
`defuse.v1`. `inference.GRPCInferenceService` at the same port is the Open Inference Protocol
([trials and inference](../how-to/release.md#try-a-candidate-on-live-requests)). The Python client
(`from defuse import Client`, `from defuse.aio import Client`) wraps every call; its methods are named after them.

- **Names** are paths: `runs/{run}/regions/{region}`. An id has 1 to 63 letters, digits, `.`, `_` or `-`.
- **Errors** are a status code, a sentence that names the remedy, and `google.rpc.ErrorInfo` (domain `defuse`) with a
  reason for programs. `INVALID_ARGUMENT`: change the request. `NOT_FOUND`, `ALREADY_EXISTS`: use another name.
  `FAILED_PRECONDITION`: do something else first. `ABORTED`: wait for the work under way. `UNAVAILABLE`: a server is
  away; retry. `RESOURCE_EXHAUSTED`: the store is full, or a caller exceeds its limits. `INTERNAL`: a defect of Defuse.
  The description of a call names its special errors.
- **Retries** are safe for calls that read, and for calls that take a `request_id`, with the same id.
- **Lists** come in pages: pass the `next_page_token` of one page as the `page_token` of the next.
- **Stability**: `buf breaking` compares every change with the contract of the last release, `protos/released.binpb`.
  Changes add fields and calls and never alter them; an incompatible change needs `defuse.v2`. With each release,
  `make released-contract` stores the current contract.
"""
_OPERATIONS = """## google.longrunning.Operations

The search of a run is the operation `runs/{run}/operations/search`, a correction is
`runs/{run}/operations/{correction}`; `Run.operation` and `Correction.operation` name them. A release is
`models/{model}/operations/{request_id}`. Operations are views of stored records, so they exist after a restart. The
metadata is [OperationMetadata](#operationmetadata), the response is a [Run](#run), a [Correction](#correction) or a
[Release](#release), and the error is the error that ended the work.

- `GetOperation`: `NOT_FOUND` for an unknown or deleted operation.
- `ListOperations`: `name` is `runs/{run}`, or `runs/-` or nothing for all runs, or `models/{model}`; `filter` is
  `done=true`, `done=false` or nothing. Newest run first, each search before its corrections; releases oldest first.
- `WaitOperation` answers when the operation has ended, or when `timeout` or the deadline is about to expire.
- `CancelOperation` cancels the run or the correction; it has no effect after the end. `FAILED_PRECONDITION` for a
  release under way, because a release cannot be stopped half-way.
- `DeleteOperation` deletes an operation that has ended, `FAILED_PRECONDITION` otherwise; the run and its results stay.
"""

Comments = Mapping[tuple[int, ...], str]


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A message or an enum, with its comments."""

    name: str
    proto: DescriptorProto | EnumDescriptorProto
    path: tuple[int, ...]
    comments: Comments

    def comment(self, *below: int) -> str:
        return self.comments.get((*self.path, *below), "")


def document() -> str:
    """Return the page."""
    files = _descriptors()
    known = {one.name: one for file in files for one in _types(file)}
    parts, shown = [_INTRODUCTION], {"OperationMetadata"}
    for file in files:
        for number, service in enumerate(file.service):
            if service.name in SERVICES:
                comments = _comments(file)
                calls = [
                    (method, comments.get((6, number, 2, position), ""))
                    for position, method in enumerate(service.method)
                    if method.name in (SERVICES[service.name] or {method.name})
                ]
                parts += [f"## {service.name}\n\n{_wrapped(comments.get((6, number), ''))}\n", _examples(service.name)]
                parts += [_call(method, comment, known) for method, comment in calls]
                shown |= {_short(name) for method, _ in calls for name in (method.input_type, method.output_type)}
    parts += [_OPERATIONS, _examples("Operations"), "## Messages\n"]
    inline = shown - {"OperationMetadata"}
    parts += [_message(known[name], known) for name in sorted(_reached(shown, known) - inline)]
    return "\n".join(parts)


def _descriptors() -> Sequence[FileDescriptorProto]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "protos.binpb"
        compile_protos(f"--descriptor_set_out={path}", "--include_source_info")
        return FileDescriptorSet.FromString(path.read_bytes()).file


def _comments(file: FileDescriptorProto) -> Comments:
    """Return the comments of a file by the paths of their subjects, each on one line."""
    return {
        tuple(location.path): " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
        if location.leading_comments
    }


def _types(file: FileDescriptorProto) -> Iterator[_Described]:
    comments = _comments(file)
    for number, message in enumerate(file.message_type):
        yield _Described(name=message.name, proto=message, path=(4, number), comments=comments)
        for position, enum in enumerate(message.enum_type):
            yield _Described(
                name=f"{message.name}.{enum.name}", proto=enum, path=(4, number, 4, position), comments=comments
            )


def _reached(names: set[str], known: Mapping[str, _Described]) -> set[str]:
    """Return these messages and all messages that they hold, directly or indirectly."""
    reached: set[str] = set()
    left = set(names)
    while left:
        name = left.pop()
        reached.add(name)
        proto = known[name].proto
        if isinstance(proto, DescriptorProto):
            entries = [field for entry in proto.nested_type for field in entry.field]
            types = {_short(field.type_name) for field in [*proto.field, *entries]}
            left |= {found for found in types if found in known} - reached
    return reached


def _call(method: MethodDescriptorProto, comment: str, known: Mapping[str, _Described]) -> str:
    streams = {(True, False): " A stream of requests.", (False, True): " A stream of responses."}
    note = streams.get((method.client_streaming, method.server_streaming), "")
    request, response = known[_short(method.input_type)], known[_short(method.output_type)]
    return "\n".join(
        [
            f"### {method.name}\n",
            f"{_wrapped(comment + note)}\n",
            _fields("Request", request, known),
            _fields("Response", response, known),
        ]
    )


def _message(described: _Described, known: Mapping[str, _Described]) -> str:
    head = f"### {described.name}\n\n{_wrapped(described.comment())}\n"
    if isinstance(described.proto, EnumDescriptorProto):
        values = enumerate(described.proto.value)
        return f"{head}\n{''.join(_item(f'`{value.name}`', described.comment(2, number)) for number, value in values)}"
    return f"{head}\n{_fields('Fields', described, known)}"


def _fields(title: str, described: _Described, known: Mapping[str, _Described]) -> str:
    proto = described.proto
    assert isinstance(proto, DescriptorProto)
    if not proto.field:
        return f"{title}: no fields.\n"
    items = [
        _item(f"`{field.name}` ({_type(field, proto, known)})", described.comment(2, number))
        for number, field in enumerate(proto.field)
    ]
    return f"{title}:\n\n{''.join(items)}"


def _item(term: str, meaning: str) -> str:
    """Return an entry of a list, wrapped."""
    return f"{_wrapped(f'- {term}: {meaning}', indent='  ')}\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _type(field: FieldDescriptorProto, owner: DescriptorProto, known: Mapping[str, _Described]) -> str:
    for entry in owner.nested_type:
        if entry.options.map_entry and field.type_name.endswith(f".{entry.name}"):
            key, value = entry.field
            return f"map of {_type(key, entry, known)} to {_type(value, entry, known)}"
    name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.type_name:
        short = _short(field.type_name)
        name = f"[{short}](#{re.sub('[^a-z]', '', short.lower())})" if short in known else f"`{short.lstrip('.')}`"
    return f"list of {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def _short(type_name: str) -> str:
    return type_name.removeprefix(_PACKAGE)


def _examples(service: str) -> str:
    """Return the examples of a service: one in Python, and requests for grpcurl."""
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", service).lower()
    parts = [f"In Python:\n\n```python\n{(EXAMPLES / f'{snake}.py').read_text()}```\n", "In a shell:\n"]
    for path in sorted(EXAMPLES.glob(f"{service}.*.json")):
        package = "google.longrunning" if service == "Operations" else "defuse.v1"
        method = path.stem.partition(".")[2]
        parts.append(
            f"```bash\ngrpcurl -plaintext -d @ $DEFUSE_GATEWAY {package}.{service}/{method} <<EOF\n"
            f"{path.read_text()}EOF\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(document())
