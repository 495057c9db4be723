"""Resource names, such as `models/{model}` and `runs/{run}/regions/{region}`."""

import re

from defuse.errors import InvalidInput

# Suffixes of the Triton names of a model's guard, and of the ensemble of both.
GUARD, GUARDED = "-guard", "-guarded"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# Id of a run's search operation; the other operations of a run have the ids of its corrections.
SEARCH = "search"


def check_id(kind: str, value: str, *, field: str | None = None) -> str:
    """Return a valid id; raise InvalidInput for any other.

    `field` is the field of the request that has the id.
    """
    if not _ID.fullmatch(value):
        raise InvalidInput(
            f"{kind} id {value!r} is refused: use 1 to 63 letters, digits, '.', '_' or '-', a letter or digit first",
            reason="INVALID_ID",
            field=field,
        )
    return value


def model(model_id: str) -> str:
    return f"models/{check_id('model', model_id)}"


def model_version(model_name: str, version: int) -> str:
    return f"{model_name}/versions/{version}"


def verdict(model_id: str, verdict_id: str) -> str:
    return f"{model(model_id)}/verdicts/{check_id('verdict', verdict_id)}"


def trial(model_id: str, trial_id: str) -> str:
    return f"{model(model_id)}/trials/{check_id('trial', trial_id)}"


def guard(model_id: str, guard_id: str) -> str:
    return f"{model(model_id)}/guards/{check_id('guard', guard_id)}"


def monitor(model_id: str) -> str:
    return f"{model(model_id)}/monitor"


def alert(model_id: str, alert_id: str) -> str:
    return f"{model(model_id)}/alerts/{check_id('alert', alert_id)}"


def guard_model(model_id: str) -> str:
    """Return the Triton name of a model's guard."""
    return f"{model_id}{GUARD}"


def guarded_model(model_id: str) -> str:
    """Return the Triton name of the ensemble of model and guard."""
    return f"{model_id}{GUARDED}"


def publication(model_id: str, publication_id: str) -> str:
    return f"{model(model_id)}/publications/{check_id('publication', publication_id)}"


def dataset(dataset_id: str) -> str:
    return f"datasets/{check_id('dataset', dataset_id)}"


def run(run_id: str) -> str:
    return f"runs/{check_id('run', run_id)}"


def region(run_id: str, region_id: str) -> str:
    return f"{run(run_id)}/regions/{check_id('region', region_id)}"


def correction(run_id: str, correction_id: str) -> str:
    return f"{run(run_id)}/corrections/{check_id('correction', correction_id)}"


def search_operation(run_name: str) -> str:
    """Return the name of a run's search operation."""
    return f"{run_name}/operations/{SEARCH}"


def correction_operation(correction_name: str) -> str:
    """Return the name of a correction's operation."""
    return f"{parent(correction_name)}/operations/{last(correction_name)}"


def publication_operation(publication_name: str) -> str:
    """Return the name of a release's operation."""
    return f"{parent(publication_name)}/operations/{last(publication_name)}"


def last(name: str) -> str:
    """Return the id at the end of a resource name."""
    return name.rsplit("/", 1)[-1]


def parent(name: str) -> str:
    """Return the parent of a resource: `runs/a` for `runs/a/regions/r1`.

    The parent of a top-level resource is empty.
    """
    return "/".join(name.split("/")[:-2])


def check(name: str, pattern: str, *, field: str | None = None) -> str:
    """Return a name that matches a pattern, such as `runs/*`.

    Raises InvalidInput for any other name. `field` is the field of the request that has the name.
    """
    parts, wanted = name.split("/"), pattern.split("/")
    if len(parts) != len(wanted) or any(w not in {"*", p} for p, w in zip(parts, wanted, strict=True)):
        raise InvalidInput(
            f"{name!r} is not a resource name of the form {pattern!r}", reason="INVALID_NAME", field=field
        )
    for collection, part in zip(parts[::2], parts[1::2], strict=True):
        check_id(collection.rstrip("s"), part, field=field)
    return name
