"""Runs, failures and cost estimates from messages."""

from datetime import UTC, datetime

import numpy as np
import pytest
from defuse.v1 import (
    failure_pb2,
    generator_service_pb2,
    run_pb2,
    tensor_pb2,
)
from defuse.values import (
    CostEstimate,
    Estimate,
    FailureBatch,
    Pilot,
    Preflight,
    Run,
    SearchCounts,
    ValidityAdvice,
)
from google.protobuf.timestamp_pb2 import Timestamp

TIMESTAMP = Timestamp(seconds=1_700_000_000)
WHEN = datetime.fromtimestamp(1_700_000_000, UTC)
HALF = tensor_pb2.Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)


@pytest.mark.parametrize("state", run_pb2.Run.State.keys()[1:])
def test_run(state: str) -> None:
    """A run has plain ids, a lower-case state, counts and configuration."""
    message = run_pb2.Run(
        name="runs/first",
        state=state,
        config={"model": "models/tiny", "model_version": 2, "dataset": "datasets/d1", "search": {"radius_sd": 0.5}},
        counts={"sources": 7, "failures": 3},
        create_time=TIMESTAMP,
    )
    run = Run.from_proto(message)
    assert (run.id, run.state, run.model, run.model_version, run.dataset) == (
        "first",
        state[6:].lower(),
        "tiny",
        2,
        "d1",
    )
    assert (run.counts.sources, run.counts.failures, run.create_time) == (7, 3, WHEN)
    assert run.config["search"]["radius_sd"] == 0.5
    assert set(run.config) == {"search", "vae", "validity", "preflight", "mixture"}
    assert run.ended == (run.state in {"succeeded", "failed", "cancelled"})


def test_validity_from() -> None:
    """The other run has a plain id, empty for none."""
    for name, expected in (("runs/before", "before"), ("", "")):
        assert Run.from_proto(run_pb2.Run(name="runs/first", config={"validity_from": name})).validity_from == expected


def test_validity_advice() -> None:
    """Thresholds have the names of settings.

    Zeros are kept, omitted ones are missing.
    """
    message = run_pb2.ValidityAdvice(
        validity={"min_typicality": 0.0, "max_round_trip_sd": 0.5},
        invalid_rejected=0.75,
        valid_rejected=0.0625,
        invalid_regions=2,
        valid_regions=5,
    )
    assert ValidityAdvice.from_proto(message) == ValidityAdvice(
        validity={"min_typicality": 0.0, "max_round_trip_sd": 0.5},
        invalid_rejected=0.75,
        valid_rejected=0.0625,
        invalid_regions=2,
        valid_regions=5,
    )


def test_search_counts() -> None:
    """Every count of the contract has its own name."""
    names = [field.name for field in run_pb2.SearchCounts.DESCRIPTOR.fields]
    planted = {name: number for number, name in enumerate(names)}
    assert vars(SearchCounts.from_proto(run_pb2.SearchCounts(**planted))) == planted


def test_preflight_and_error_reason() -> None:
    """The preflight is None before it is measured.

    A refused run has a reason.
    """
    assert Run.from_proto(run_pb2.Run(name="runs/first")).preflight is None
    measured = run_pb2.Preflight(accuracy=HALF, reconstruction_accuracy=HALF, label_model_accuracy=0.75)
    message = run_pb2.Run(name="runs/first", error="mush", error_reason="VAE_TOO_COARSE", preflight=measured)
    run = Run.from_proto(message)
    assert (run.error, run.error_reason) == ("mush", "VAE_TOO_COARSE")
    half = Estimate.from_proto(HALF)
    assert run.preflight == Preflight(
        accuracy=half, reconstruction_accuracy=half, label_model_accuracy=0.75, pilot=None
    )


def test_a_pilot() -> None:
    """The choice of a rendering comes with its figures."""
    message = run_pb2.Run(
        name="runs/first",
        config={"search": {"rendering": "RENDERING_RESIDUAL"}, "validity": {"label_model": "LABEL_MODEL_IMAGE"}},
        preflight={
            "pilot": {
                "sources": 200,
                "reconstructions_lost": HALF,
                "decoder": {"decodes": 10, "valid": HALF},
                "residual": {"decodes": 10, "valid": HALF},
                "p_value": 0.25,
                "rendering": "RENDERING_RESIDUAL",
            }
        },
    )
    run, half = Run.from_proto(message), Estimate.from_proto(HALF)
    assert (run.rendering, run.label_model) == ("residual", "image")
    assert run.preflight
    assert run.preflight.pilot == Pilot(
        rendering="residual",
        sources=200,
        reconstructions_lost=half,
        decoder_valid=half,
        residual_valid=half,
        p_value=0.25,
    )


def test_failures() -> None:
    """A failure has every field of the contract.

    Its latent is an array.
    """
    fields = {
        "source": 7,
        "round": 2,
        "draw": 3,
        "true_label": 1,
        "predicted_label": 4,
        "margin": -0.5,
        "radius_sd": 0.25,
        "typicality": 0.75,
        "label_probability": 0.5,
        "neighbour_agreement": 1.0,
        "round_trip_sd": 0.125,
        "oracle_margin": 2.0,
        "model_version": 9,
        "held_out": True,
    }
    message = failure_pb2.Failure(run="runs/first", latent=[0.5, -1.5], **fields)
    batch = FailureBatch.from_proto(
        generator_service_pb2.IdentifyResponse(failures=[message], shard=3, resume_token="2.3.1")
    )
    [failure] = batch.failures
    found = vars(failure)
    np.testing.assert_array_equal(found.pop("latent"), np.array([0.5, -1.5], np.float32), strict=True)
    assert found == fields
    assert batch.resume_token == "2.3.1"


def test_cost_estimate() -> None:
    fields = {"sources": 100, "decodes": 5000, "decodes_per_s": 250.0, "training_s": 30.0, "search_s": 20.8}
    assert vars(CostEstimate.from_proto(run_pb2.CostEstimate(**fields))) == fields
