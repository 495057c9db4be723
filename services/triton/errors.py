"""What Triton's refusals mean, said in our own errors."""

from defuse.errors import DefuseError, Internal, NotReady, Unavailable
from tritonclient.utils import InferenceServerException

# What Triton answers while it starts, stops, or is not there.
_AWAY = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
# In answers about a version that was unloaded, whose status is UNAVAILABLE too; never while one is loaded again.
_UNLOADED = "not at ready state"
_NO_REGION = "Unable to find shared memory region"


def is_away(error: InferenceServerException) -> bool:
    """Say whether this is no answer of Triton's: what was asked may be under way, or may never have arrived."""
    return error.status() in _AWAY and _UNLOADED not in error.message()


def lacks_region(error: InferenceServerException) -> bool:
    """Say whether Triton does not know the request's shared memory: it was started again since."""
    return _NO_REGION in error.message()


def meaning_of(error: InferenceServerException, url: str) -> DefuseError:
    """Return the error of ours that a refusal of the Triton at `url` means."""
    text = error.message()
    if is_away(error):
        return Unavailable(
            f"Triton at {url} does not answer ({text}); start it or set DEFUSE_TRITON_URL",
            reason="TRITON_UNAVAILABLE",
        )
    if "not found" in text or "not ready" in text or _UNLOADED in text:
        return NotReady(
            f"Triton at {url} does not serve this model ({text}); load it, or name a version that is served",
            reason="MODEL_NOT_SERVED",
        )
    return Internal(f"Triton at {url} refused the request: {text}", reason="TRITON_REFUSED")
