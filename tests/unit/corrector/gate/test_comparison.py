"""Faults of versions that do not answer."""

import numpy as np
import pytest
from defuse.errors import DeadlineExceeded, DefuseError, Internal, InvalidInput, NotReady, Unavailable
from defuse.v1 import model_pb2

from services.arrays import Array
from services.corrector.gate.comparison import FaultReportingVersion

IMAGES = np.zeros((2, 1, 3, 3), np.float32)


class Version:
    """Answers with what it was asked, or fails."""

    model, served = model_pb2.Model(name="models/tiny"), True

    def __init__(self, error: DefuseError | None = None) -> None:
        self._error = error

    def classify(self, images: Array) -> Array:
        if self._error:
            raise self._error
        return images

    classify_stored = classify


def test_answers_pass() -> None:
    """The candidate's own answers are compared."""
    asked = FaultReportingVersion(Version())
    assert asked.classify(IMAGES) is IMAGES
    assert asked.classify_stored(IMAGES) is IMAGES
    assert (asked.model.name, asked.served) == ("models/tiny", True)


@pytest.mark.parametrize("error", [Internal("a node failed"), NotReady("not loaded"), InvalidInput("a bad shape")])
def test_an_error_is_the_candidate_s(error: DefuseError) -> None:
    """It becomes a reason not to let it through, with the words of who noticed."""
    with pytest.raises(InvalidInput, match=f"does not answer 2 images: {error.message}"):
        FaultReportingVersion(Version(error)).classify(IMAGES)


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded("slow")])
def test_where_triton_is_away_nobody_is_to_blame(error: DefuseError) -> None:
    """Nothing was learned of the candidate."""
    with pytest.raises(type(error), match=error.message):
        FaultReportingVersion(Version(error)).classify_stored(IMAGES)
