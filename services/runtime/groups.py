"""Several groups of arrays in one artifact, as `group.name`: what belongs together is written together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]


def joined(**groups: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of all groups, each by its group and its name."""
    return {f"{group}.{name}": np.asarray(array) for group, arrays in groups.items() for name, array in arrays.items()}


def group(arrays: Arrays, wanted: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of one group by their names."""
    prefix = f"{wanted}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
