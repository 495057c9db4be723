import numpy as np
import pytest
from defuse.v1 import failure_pb2, run_pb2

from services.generator.failures import Failures, SearchCounters


def three() -> Failures:
    return Failures.of(
        source=np.array([4, 4, 9]),
        draw=np.array([0, 2, 1]),
        margin=np.array([-1.0, -2.0, -3.0]),
        held_out=np.array([True, True, False]),
        latent=np.arange(6, dtype=np.float32).reshape(3, 2),
    )


def test_fields_are_those_of_the_contract() -> None:
    """A failure has every field of the contract, but for what the whole run shares, and no other."""
    contract = {field.name for field in failure_pb2.Failure.DESCRIPTOR.fields}
    assert set(three().arrays()) == contract - {"run", "model_version"}


def test_counts_are_those_of_the_contract() -> None:
    """Every count of the contract is counted, and no other."""
    assert set(vars(SearchCounters())) == {field.name for field in run_pb2.SearchCounts.DESCRIPTOR.fields}


def test_types_are_those_that_are_stored() -> None:
    """For any input types, identities are integers and measurements float32; missing fields are 0."""
    found = three()
    assert [found.source.dtype, found.draw.dtype, found.margin.dtype] == [np.dtype(t) for t in ("i8", "i4", "f4")]
    assert found.held_out.tolist() == [1, 1, 0]
    assert found.typicality.tolist() == [0, 0, 0]
    assert found.with_signals(typicality=np.array([0.1, 0.2, 0.3])).typicality.dtype == np.float32


def test_measurements_are_recorded_on_the_same_failures() -> None:
    """Recording a value changes that field and leaves the failures that it was recorded from."""
    before = three()
    after = before.with_signals(round_trip_sd=np.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(after.round_trip_sd, [0.1, 0.2, 0.3])
    assert before.round_trip_sd.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(after.latent, before.latent)


@pytest.mark.parametrize("keep", [np.array([True, False, True]), np.array([0, 2]), slice(0, 3, 2)])
def test_some_are_taken(keep: "slice | np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
    """A mask, an index or a slice selects the same failures in all fields."""
    some = three().take(keep)
    assert (some.source.tolist(), some.margin.tolist()) == ([4, 9], [-1, -3])
    np.testing.assert_array_equal(some.latent, [[0, 1], [4, 5]])


def test_parts_are_joined_in_order() -> None:
    """Parts come one after the other, empty ones change nothing, and types stay."""
    whole = Failures.joined([Failures.none(2), three().take(slice(1)), Failures.none(2), three().take(slice(1, None))])
    for name, array in three().arrays().items():
        np.testing.assert_array_equal(whole.arrays()[name], array)
        assert whole.arrays()[name].dtype == array.dtype


def test_rejections_add_up_under_their_reason() -> None:
    """Each rejection adds to the count of its reason and to no other; an unknown reason is a defect."""
    counts = SearchCounters(rejected_by_radius=1)
    counts.reject("radius_sd", 2)
    counts.reject("confirmation", 4)
    assert counts == SearchCounters(rejected_by_radius=3, rejected_by_confirmation=4)
    with pytest.raises(KeyError):
        counts.reject("margin", 1)
