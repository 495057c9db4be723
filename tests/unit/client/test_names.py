import pytest
from defuse import names
from defuse.errors import InvalidInput


def test_names_from_ids() -> None:
    """Each kind of resource has its pattern."""
    assert names.model("tiny") == "models/tiny"
    assert names.model_version("models/tiny", 3) == "models/tiny/versions/3"
    assert names.dataset("d1") == "datasets/d1"
    assert names.run("first") == "runs/first"
    assert names.region("first", "r1") == "runs/first/regions/r1"
    assert names.correction("first", "c1") == "runs/first/corrections/c1"


def test_last_and_parent() -> None:
    """Ids and parents are found in names."""
    assert names.last("runs/first/regions/r1") == "r1"
    assert names.last("runs/first") == "first"
    assert names.parent("runs/first/regions/r1") == "runs/first"
    assert names.parent("runs/first") == ""


@pytest.mark.parametrize("value", ["a", "A.b_c-9", "0", "x" * 63])
def test_valid_ids(value: str) -> None:
    """An id has 1 to 63 of the allowed characters."""
    assert names.check_id("run", value) == value


@pytest.mark.parametrize("value", ["", "-a", ".", "..", "_a", "a/b", "a b", "ä", "a\n", "x" * 64, "a\x00"])
def test_invalid_ids(value: str) -> None:
    """The error has the kind and the id.

    No id is a path, an option or a line.
    """
    for build in (names.model, names.dataset, names.run):
        with pytest.raises(InvalidInput) as caught:
            build(value)
        assert repr(value) in caught.value.message
        assert caught.value.reason == "INVALID_ID"


@pytest.mark.parametrize(
    ("name", "pattern"), [("runs/first", "runs/*"), ("runs/first/corrections/c1", "runs/*/corrections/*")]
)
def test_matching_names(name: str, pattern: str) -> None:
    """A matching name is returned."""
    assert names.check(name, pattern) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "INVALID_NAME"),
        ("first", "INVALID_NAME"),
        ("models/first", "INVALID_NAME"),
        ("runs/first/regions/r1", "INVALID_NAME"),
        ("/runs/first", "INVALID_NAME"),
        ("runs/first/", "INVALID_NAME"),
        ("runs/", "INVALID_ID"),
        ("runs/..", "INVALID_ID"),
    ],
)
def test_other_names(name: str, reason: str) -> None:
    """The error has the name or the id, and the field."""
    with pytest.raises(InvalidInput) as caught:
        names.check(name, "runs/*", field="run")
    assert (caught.value.reason, caught.value.field) == (reason, "run")
