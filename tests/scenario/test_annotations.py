"""Annotations and their effects: a mixed region is split, invalid ones fit the next run's thresholds."""

from collections.abc import Iterator
from typing import Any

import pytest
from defuse import Client, NotReady

from tests.conftest import Stack
from tests.planted import TRUE, WRONG
from tests.scenario.conftest import RUN_TIMEOUT_S, SEARCH

RUN, WHOLE = "all-in-one", "r1"
SPOT = (str(TRUE), str(WRONG))


@pytest.fixture(scope="module")
def subject(undisturbed: Any) -> dict[str, Any]:
    """The settings of runs on the same model and data, with the same VAE."""
    return {"model": undisturbed["model"], "dataset": undisturbed["dataset"], "vae": {"epochs": int(SEARCH[1])}}


@pytest.fixture(scope="module")
def client(stack: Stack, subject: dict[str, Any]) -> Iterator[Client]:
    """Leave a run whose mixture has one component: all confusions are one region."""
    with stack.client() as client:
        client.create_run(
            RUN,
            **subject,
            search={"draws_per_source": int(SEARCH[3]), "rendering": "decoder"},
            mixture={"kind": "plain", "max_components": 1, "min_support": 5},
        )
        run = client.wait_for_run(RUN, timeout_s=RUN_TIMEOUT_S)
        assert run.state == "succeeded", run.error
        assert [region.id for region in client.regions(RUN)] == [WHOLE]
        yield client


@pytest.fixture
def parts(stack: Stack, client: Client) -> list[Any]:
    """Call the region mixed; return its parts as the command line prints them."""
    whole, *parts = stack.defuse("annotate", RUN, WHOLE, "--verdict", "mixed", "--annotator", "tester")
    assert (whole["id"], whole["state"]) == (WHOLE, "mixed")
    assert [part["id"] for part in parts] == [f"{WHOLE}-{rank}" for rank in range(1, 1 + len(parts))]
    return parts


def confusion(part: Any) -> tuple[str, str]:
    return part["true_label"], part["predicted_label"]


def test_a_mixed_region_becomes_regions_of_one_confusion(client: Client, parts: list[Any]) -> None:
    """The planted spot is a part with everything that a region has; parts follow the verdict on the whole."""
    found = {region.id: region for region in client.regions(RUN)}
    assert set(found) == {WHOLE, *(part["id"] for part in parts)}
    assert [region.score for region in found.values()] == sorted((r.score for r in found.values()), reverse=True)
    assert len({confusion(part) for part in parts}) > 1
    assert all(len(part["profile"]) == 1 for part in parts)
    spot = next(found[part["id"]] for part in parts if confusion(part) == SPOT)
    assert spot.error_rate.low > spot.control_error_rate.high
    assert len(client.region(RUN, spot.id).exemplars) > 0
    assert len(client.sample_region(RUN, spot.id, 3)) == 3

    client.annotate(RUN, spot.id, label=str(TRUE))
    client.annotate(RUN, WHOLE, verdict="unsure")
    assert [region.id for region in client.regions(RUN)] == [WHOLE]
    with pytest.raises(NotReady, match="has a label"):
        client.create_correction(RUN)
    client.annotate(RUN, WHOLE, verdict="mixed")
    states = {region.id: region.state for region in client.regions(RUN)}
    assert (states[WHOLE], states[spot.id]) == ("mixed", "labelled")


def test_what_is_invalid_teaches_the_next_run(
    stack: Stack, client: Client, subject: dict[str, Any], parts: list[Any]
) -> None:
    """Thresholds are learned from an invalid and a labelled part; a run that takes them has them in its settings."""
    spot, other = (next(part for part in parts if (confusion(part) == SPOT) is wanted) for wanted in (True, False))
    client.annotate(RUN, spot["id"], label=str(TRUE))
    with pytest.raises(NotReady, match=f"no region of run '{RUN}' is invalid"):
        client.advise_validity(RUN)
    client.annotate(RUN, other["id"], verdict="invalid")
    printed, had = stack.defuse("runs", "validity", RUN), client.run(RUN).config["validity"]
    assert (printed["invalid_regions"], printed["valid_regions"]) == (1, 1)
    assert printed["valid_rejected"] <= 0.1
    assert printed["invalid_rejected"] >= printed["valid_rejected"]
    advised = printed["validity"]
    assert all(value >= had[name] for name, value in advised.items() if name.startswith("min_"))
    assert all(value <= had[name] for name, value in advised.items() if name.startswith("max_"))

    learned = client.create_run("learned", **subject, validity={"min_typicality": 0.0}, validity_from=RUN)
    client.cancel_run("learned")
    assert learned.validity_from == RUN
    thresholds = {name: learned.config["validity"][name] for name in advised}
    assert thresholds == {**advised, "min_typicality": 0.0}
    assert client.estimate_run(**subject, validity_from=RUN).sources > 0
    with pytest.raises(NotReady, match="no region of run 'undisturbed' is invalid"):
        client.create_run("unlearned", **subject, validity_from="undisturbed")
