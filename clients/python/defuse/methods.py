"""Methods of a client, made from described calls: signature and documentation are the description's."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

M = TypeVar("M", bound=Callable[..., Any])
_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)


def described(description: Callable[..., Any]) -> Callable[[M], M]:
    """Give a method the name, the documentation and the parameters of a description, and the type that it returns."""

    def decorate(method: M) -> M:
        functools.update_wrapper(method, description)
        signature = inspect.signature(description)
        returned = get_args(signature.return_annotation)[-1]
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # read by `help` and notebooks
            parameters=[_SELF, *signature.parameters.values()], return_annotation=returned
        )
        return method

    return decorate
