"""Base classes whose methods are made from the tables in `defuse.calls`.

Type checkers and editors read `methods.pyi`, which `python -m clients.generate_stubs`
writes from the same tables. A derived class implements `_run_call` and `_read_stream`,
which execute a call with or without an event loop.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin

from defuse.calls import CLIENT_CALLS, LATENT_SPACE_CALLS, Call
from defuse.calls.sans_io import StreamRpc

_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _base_class(name: str, doc: str, calls: Mapping[str, Call], *, asynchronous: bool, bound: str = "") -> Any:
    """Return a class with a method for each call.

    The attribute named `bound` is passed as the first argument of each call.
    """
    members: dict[str, Any] = {
        method: _method(call, asynchronous=asynchronous, bound=bound) for method, call in calls.items()
    }
    return type(name, (), {**members, "__doc__": doc, "__module__": __name__})


def _method(call: Call, *, asynchronous: bool, bound: str) -> Callable[..., Any]:
    """Return the method of a call, with its signature and docstring."""

    def start(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = (getattr(self, bound),) if bound else ()
        return call(*first, *args, **kwargs)

    def read_stream(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self._read_stream(start(self, args, kwargs))

    def run_call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self._run_call(start(self, args, kwargs))

    async def run_call_async(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return await self._run_call(start(self, args, kwargs))

    signature = inspect.signature(call)
    streams = get_origin(signature.return_annotation) is StreamRpc
    method = read_stream if streams else run_call_async if asynchronous else run_call
    functools.update_wrapper(method, call)
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    result = get_args(signature.return_annotation)[-1]
    # `help` and notebooks read this attribute.
    method.__signature__ = signature.replace(parameters=[_SELF, *parameters], return_annotation=result)  # type: ignore[attr-defined]
    return method


ClientMethods = _base_class("ClientMethods", "Methods of `defuse.Client`.", CLIENT_CALLS, asynchronous=False)
AsyncClientMethods = _base_class(
    "AsyncClientMethods", "Methods of `defuse.aio.Client`.", CLIENT_CALLS, asynchronous=True
)
LatentSpaceMethods = _base_class(
    "LatentSpaceMethods", "Methods of `defuse.LatentSpace`.", LATENT_SPACE_CALLS, asynchronous=False, bound="run_id"
)
AsyncLatentSpaceMethods = _base_class(
    "AsyncLatentSpaceMethods",
    "Methods of `defuse.aio.LatentSpace`.",
    LATENT_SPACE_CALLS,
    asynchronous=True,
    bound="run_id",
)
