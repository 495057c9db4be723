"""Write docs/reference/api.md from the protos and the examples: `python -m protos.document`.

Its text is that of the comments on methods, messages and fields.
"""

import re
import tempfile
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
EXAMPLES = DOCS / "examples"
# What is offered to other teams, and of GeneratorService which calls.
SERVICES: Mapping[str, set[str] | None] = {
    "GatewayService": None,
    "MonitorService": None,
    "GeneratorService": {"Identify", "Encode", "Decode", "Interpolate"},
}
_PACKAGE = ".defuse.v1."
_INTRODUCTION = """# API

Written from `protos/` by `python -m protos.document`; a change belongs there.

One port, the gateway's, answers all of this over gRPC, with reflection and health; packages and message names are
`defuse.v1`. `inference.GRPCInferenceService` at the same port is the Open Inference Protocol
([operations](operations.md#releases)). The Python client (`from defuse import Client`, `from defuse.aio import Client`)
wraps every call; its methods are named after them and say the same.

- **Names** are paths: `runs/{run}/regions/{region}`. An id has 1 to 63 letters, digits, `.`, `_` or `-`.
- **Errors** are a status code with a sentence that says what to do, and `google.rpc.ErrorInfo` (domain `defuse`) with a
  reason for programs. `INVALID_ARGUMENT`: change the request. `NOT_FOUND`, `ALREADY_EXISTS`: another name.
  `FAILED_PRECONDITION`: do something else first. `ABORTED`: wait for what is under way. `UNAVAILABLE`: a server is
  away, ask again. `RESOURCE_EXHAUSTED`: the store is full. `INTERNAL`: a defect of ours. What is special to a call is
  said with it.
- **Asking again** is safe for calls that read, and for those that take a `request_id` with the same id.
- **Lists** come in pages: give the `next_page_token` of one as the `page_token` of the next.
- **Stability**: `buf breaking` compares every change with the contract of the last release, `protos/released.binpb`.
  Fields and calls are added, never changed; what must change does so in `defuse.v2`. With each release,
  `make released-contract` takes today's contract on.
"""
_OPERATIONS = """## google.longrunning.Operations

A run's search is the operation `runs/{run}/operations/search`, a correction `runs/{run}/operations/{correction}`;
`Run.operation` and `Correction.operation` name it. A release is `models/{model}/operations/{request_id}`. They are
views of records, so they are there after a restart. Metadata is [OperationMetadata](#operationmetadata), the response
a [Run](#run), a [Correction](#correction) or a [Release](#release), the error what ended it.

- `GetOperation`: `NOT_FOUND` for an unknown or deleted one.
- `ListOperations`: `name` is `runs/{run}`, or `runs/-` or nothing for all runs, or `models/{model}`; `filter` is
  `done=true`, `done=false` or nothing. Newest run first, each search before its corrections; releases oldest first.
- `WaitOperation` answers when it has ended, or when `timeout` or the call's deadline is about to be over.
- `CancelOperation` cancels the run or the correction; no effect on what has ended. `FAILED_PRECONDITION` for a release
  under way, which nobody can stop half-way.
- `DeleteOperation` forgets one that has ended, `FAILED_PRECONDITION` otherwise; the run and its results stay.
"""

Comments = Mapping[tuple[int, ...], str]


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A message or an enum with where its comments are."""

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
                parts += [f"## {service.name}\n\n{comments.get((6, number), '')}\n", _examples(service.name)]
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
    """Return the comments of a file by the paths of what they are about, each on one line."""
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
    """Return what these messages, and all that they hold, are made of, themselves included."""
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
            f"{comment}{note}\n",
            _fields("Request", request, known),
            _fields("Response", response, known),
        ]
    )


def _message(described: _Described, known: Mapping[str, _Described]) -> str:
    head = f"### {described.name}\n\n{described.comment()}\n"
    if isinstance(described.proto, EnumDescriptorProto):
        values = [(value.name, described.comment(2, number)) for number, value in enumerate(described.proto.value)]
        return f"{head}\n{_table(('value', 'meaning'), values)}"
    return f"{head}\n{_fields('Field', described, known)}"


def _fields(title: str, described: _Described, known: Mapping[str, _Described]) -> str:
    proto = described.proto
    assert isinstance(proto, DescriptorProto)
    if not proto.field:
        return f"{title}: no fields.\n"
    rows = [
        (f"`{field.name}`", _type(field, proto, known), described.comment(2, number))
        for number, field in enumerate(proto.field)
    ]
    return _table((title.lower() if title == "Field" else f"{title.lower()} field", "type", "meaning"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
    (DOCS / "api.md").write_text(document())
