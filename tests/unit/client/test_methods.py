import inspect
import pydoc
from collections.abc import Iterator
from typing import Any

import pytest
from defuse import Client, LatentSpace, Operation, Run, aio

PUBLIC = [name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]


def test_a_method_says_what_it_takes_and_gives() -> None:
    """Signature, documentation and name are those of a plain method, on the class and on a client."""
    signature = inspect.signature(Client.wait_for_run)
    assert list(signature.parameters) == ["self", "run_id", "timeout_s", "on_change"]
    assert signature.return_annotation is Run
    with Client("127.0.0.1:1") as client:
        bound = inspect.signature(client.run)
    assert (list(bound.parameters), bound.return_annotation) == (["run_id"], Run)
    assert (Client.run.__name__, Client.run.__doc__) == ("run", "Return a run.")
    shown = pydoc.plain(pydoc.render_doc(Client))
    assert "create_run(self, run_id: str, *, model: str, dataset: str, **settings: Any)" in shown
    assert "Start a run. `settings` are the other fields of `defuse.calls.runs.RunSettings`" in shown


@pytest.mark.parametrize("name", PUBLIC)
def test_both_clients_have_the_same_methods(name: str) -> None:
    """What one client can do the other one can, with the same parameters and the same words."""
    one, other = getattr(Client, name), getattr(aio.Client, name)
    assert inspect.signature(one).parameters == inspect.signature(other).parameters
    assert one.__doc__ == other.__doc__
    assert one.__doc__


def test_no_client_has_more() -> None:
    """Nothing is there for programs with an event loop alone."""
    others = [name for name, _ in inspect.getmembers(aio.Client, inspect.isfunction) if not name.startswith("_")]
    assert others == PUBLIC


@pytest.mark.parametrize(("one", "other"), [(Operation, aio.Operation), (LatentSpace, aio.LatentSpace)])
def test_what_both_clients_hand_out(one: Any, other: Any) -> None:
    """Operations and latent spaces have the same methods on both sides, with the same parameters."""
    methods = [name for name, _ in inspect.getmembers(one, inspect.isfunction) if not name.startswith("_")]
    assert methods == [name for name, _ in inspect.getmembers(other, inspect.isfunction) if not name.startswith("_")]
    for name in methods:
        assert list(inspect.signature(getattr(one, name)).parameters) == list(
            inspect.signature(getattr(other, name)).parameters
        )


def test_the_rest_of_a_stream_is_an_iterator() -> None:
    """What follows a run is read by `for`, and nothing is asked before it is."""
    with Client("127.0.0.1:1") as client:
        assert isinstance(client.watch_run("first"), Iterator)
