import numpy as np

from services.storage.safetensors import join_groups, select_group


def test_groups_come_apart_as_they_were_put_together() -> None:
    """Each group has its own arrays and no others, also where one name begins like another, or holds a dot."""
    groups = {"sum": {"x": np.arange(3)}, "sums": {"x": np.arange(2), "y.z": np.arange(4)}, "none": {}}
    arrays = join_groups(**groups)
    assert set(arrays) == {"sum.x", "sums.x", "sums.y.z"}
    for name, expected in groups.items():
        found = select_group(arrays, name)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)
    assert select_group(arrays, "other") == {}
