"""Methods of both clients, and their stubs."""

import ast
import inspect
import pydoc
from collections.abc import Iterator
from typing import Any

import pytest
from defuse import Client, LatentSpace, Operation, Run, aio

from clients import generate_stubs

PUBLIC = [name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]


def test_signature_and_docstring() -> None:
    """A method has the signature, docstring and name of its call."""
    signature = inspect.signature(Client.wait_for_run)
    assert list(signature.parameters) == ["self", "run_id", "timeout_s", "on_change"]
    assert signature.return_annotation is Run
    with Client("127.0.0.1:1") as client:
        bound = inspect.signature(client.run)
    assert (list(bound.parameters), bound.return_annotation) == (["run_id"], Run)
    assert (Client.run.__name__, Client.run.__doc__) == ("run", "Return a run.")
    shown = pydoc.plain(pydoc.render_doc(Client))
    assert "create_run(self, run_id: str, *, model: str, dataset: str, **settings: Any)" in shown
    assert "`settings` are the other fields of `defuse.calls.runs.RunSettings`" in shown


@pytest.mark.parametrize("name", PUBLIC)
def test_clients_have_the_same_methods(name: str) -> None:
    """Both clients have the same parameters and docstrings."""
    one, other = getattr(Client, name), getattr(aio.Client, name)
    assert inspect.signature(one).parameters == inspect.signature(other).parameters
    assert one.__doc__ == other.__doc__
    assert one.__doc__


def test_aio_client_has_no_more_methods() -> None:
    others = [name for name, _ in inspect.getmembers(aio.Client, inspect.isfunction) if not name.startswith("_")]
    assert others == PUBLIC


@pytest.mark.parametrize(("one", "other"), [(Operation, aio.Operation), (LatentSpace, aio.LatentSpace)])
def test_returned_classes_have_the_same_methods(one: Any, other: Any) -> None:
    """Operations and latent spaces are the same in both clients."""
    methods = [name for name, _ in inspect.getmembers(one, inspect.isfunction) if not name.startswith("_")]
    assert methods == [name for name, _ in inspect.getmembers(other, inspect.isfunction) if not name.startswith("_")]
    for name in methods:
        assert list(inspect.signature(getattr(one, name)).parameters) == list(
            inspect.signature(getattr(other, name)).parameters
        )


def test_streams_are_iterators() -> None:
    """A stream is an iterator, and sends nothing before it is read."""
    with Client("127.0.0.1:1") as client:
        assert isinstance(client.watch_run("first"), Iterator)


def test_stubs_are_current() -> None:
    """`python -m clients.generate_stubs` writes the committed stubs."""
    assert generate_stubs.STUBS.read_text(encoding="utf-8") == generate_stubs.stubs()


@pytest.mark.parametrize("cls", [Client, aio.Client, LatentSpace, aio.LatentSpace])
def test_stubs_are_complete(cls: type) -> None:
    """The stub of a base class declares each of its methods."""
    base = cls.__mro__[1]
    stubs = ast.parse(generate_stubs.STUBS.read_text(encoding="utf-8"))
    [declared] = [node for node in stubs.body if isinstance(node, ast.ClassDef) and node.name == base.__name__]
    methods = {name for name in vars(base) if not name.startswith("_")}
    assert {node.name for node in declared.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)} == methods
