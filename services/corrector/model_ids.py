"""Names under which Triton serves what belongs to a model."""

import uuid

from defuse import names
from defuse.errors import InvalidInput

_CANDIDATE = "-candidate"
# What the gate asks about is served under the model's name, this, and something of its own.
AT_GATE = "-gate-"
_KEPT_ENDINGS = (_CANDIDATE, names.GUARD, names.GUARDED)


def candidate_id(model_id: str) -> str:
    """Return the name under which a model's candidate is served."""
    return f"{model_id}{_CANDIDATE}"


def gate_id(model_id: str) -> str:
    """Return a name under which a file is served while the gate asks about it."""
    return f"{model_id}{AT_GATE}{uuid.uuid4().hex[:8]}"


def check_model_id(model_id: str) -> None:
    """Raise InvalidInput for a name that belongs to another model."""
    if model_id.endswith(_KEPT_ENDINGS) or AT_GATE in model_id:
        raise InvalidInput(
            f"model name {model_id!r} ends with one of {', '.join(map(repr, _KEPT_ENDINGS))} or has {AT_GATE!r} in it; "
            "these are kept for what belongs to a model: choose another",
            reason="INVALID_ID",
        )
