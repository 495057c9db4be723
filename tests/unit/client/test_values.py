from datetime import UTC, datetime

import numpy as np
import pytest
from defuse import tensors
from defuse.errors import InvalidInput
from defuse.v1 import (
    annotation_pb2,
    correction_pb2,
    dataset_pb2,
    failure_pb2,
    gateway_service_pb2,
    generator_service_pb2,
    model_pb2,
    region_pb2,
    release_pb2,
    run_pb2,
    tensor_pb2,
)
from defuse.values import (
    Annotation,
    Choice,
    Correction,
    CostEstimate,
    Dataset,
    Estimate,
    FailureBatch,
    Model,
    PairedDifference,
    Preflight,
    Preprocessing,
    Region,
    RegionPictures,
    Release,
    Run,
    SearchCounts,
    ValidityAdvice,
)
from google.protobuf.timestamp_pb2 import Timestamp

MOMENT = Timestamp(seconds=1_700_000_000)
WHEN = datetime.fromtimestamp(1_700_000_000, UTC)
CHANGE = correction_pb2.PairedDifference(value=-0.01, low=-0.03, high=0.01, gained=1, lost=2, trials=100, p_value=0.5)
HALF = tensor_pb2.Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)


def region(**more: object) -> region_pb2.Region:
    return region_pb2.Region(
        name="runs/first/regions/r1",
        weight=0.25,
        size=40,
        held_out_size=12,
        true_label="ant",
        predicted_label="bee",
        error_rate=HALF,
        suggested_label="ant",
        suggestion_reason="near",
        **more,  # type: ignore[arg-type]
    )


def test_estimate() -> None:
    """An estimate says its share, interval and number of trials; without trials it says that."""
    assert str(Estimate.from_proto(HALF)) == "0.500 [0.250, 0.750] (n=16)"
    assert str(Estimate.from_proto(tensor_pb2.Estimate(high=1.0))) == "not measured"


def test_preprocessing_both_ways() -> None:
    """What is declared comes back as it was."""
    declared = Preprocessing(layout="NHWC", low=-1.0, high=1.0, mean=(0.5,), std=(0.25,))
    assert Preprocessing.from_proto(declared.to_proto()) == declared
    assert declared.to_proto().layout == model_pb2.Preprocessing.LAYOUT_NHWC


@pytest.mark.parametrize("layout", ["", "nchw", "CHWN", "UNSPECIFIED"])
def test_unknown_layout(layout: str) -> None:
    """A layout that there is not is refused by name."""
    with pytest.raises(InvalidInput, match=f"layout {layout!r}"):
        Preprocessing(layout=layout).to_proto()


def test_model() -> None:
    """A model has a plain id, plain words and an aware time."""
    message = model_pb2.Model(
        name="models/tiny",
        classes=["ant", "bee"],
        preprocessing=Preprocessing().to_proto(),
        output="OUTPUT_LOGITS",
        image_shape=[8, 10, 3],
        champion_version=2,
        create_time=MOMENT,
    )
    assert Model.from_proto(message) == Model(
        id="tiny",
        classes=("ant", "bee"),
        preprocessing=Preprocessing(),
        output="logits",
        image_shape=(8, 10, 3),
        champion_version=2,
        create_time=WHEN,
    )


def test_dataset() -> None:
    """A data set says the size of each split."""
    splits = [dataset_pb2.Split(name="train", size=30), dataset_pb2.Split(name="val", size=10)]
    message = dataset_pb2.Dataset(
        name="datasets/d1", display_name="pets", image_shape=[8, 8, 1], classes=["a"], splits=splits
    )
    assert Dataset.from_proto(message) == Dataset(
        id="d1", display_name="pets", image_shape=(8, 8, 1), classes=("a",), sizes={"train": 30, "val": 10}
    )


@pytest.mark.parametrize("state", run_pb2.Run.State.keys()[1:])
def test_run(state: str) -> None:
    """A run has plain ids, its state in small letters, every count and its whole configuration."""
    message = run_pb2.Run(
        name="runs/first",
        state=state,
        config={"model": "models/tiny", "model_version": 2, "dataset": "datasets/d1", "search": {"radius_sd": 0.5}},
        counts={"sources": 7, "failures": 3},
        create_time=MOMENT,
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


def test_a_run_says_whose_annotations_it_learned_from() -> None:
    """The other run is named by its plain id; nothing where there is none."""
    for name, expected in (("runs/before", "before"), ("", "")):
        assert Run.from_proto(run_pb2.Run(name="runs/first", config={"validity_from": name})).validity_from == expected


def test_validity_advice() -> None:
    """Thresholds are by name, as a new run takes them, a zero too; what was not advised is not there."""
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


def test_counts_are_those_of_the_contract() -> None:
    """Every count of the contract is told, each under its own name."""
    names = [field.name for field in run_pb2.SearchCounts.DESCRIPTOR.fields]
    planted = {name: number for number, name in enumerate(names)}
    assert vars(SearchCounts.from_proto(run_pb2.SearchCounts(**planted))) == planted


def test_preflight_and_the_reason_of_a_refusal() -> None:
    """What preflight measured is there once it was measured; a refused run says why, for programs too."""
    assert Run.from_proto(run_pb2.Run(name="runs/first")).preflight is None
    measured = run_pb2.Preflight(accuracy=HALF, reconstruction_accuracy=HALF, label_model_accuracy=0.75)
    message = run_pb2.Run(name="runs/first", error="mush", error_reason="VAE_TOO_COARSE", preflight=measured)
    run = Run.from_proto(message)
    assert (run.error, run.error_reason) == ("mush", "VAE_TOO_COARSE")
    half = Estimate.from_proto(HALF)
    assert run.preflight == Preflight(accuracy=half, reconstruction_accuracy=half, label_model_accuracy=0.75)


def test_failures() -> None:
    """A failure has all that the contract says of it, its latent as an array; a batch says where to go on."""
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
    """What a run would cost is told in numbers."""
    fields = {"sources": 100, "decodes": 5000, "decodes_per_s": 250.0, "training_s": 30.0, "search_s": 20.8}
    assert vars(CostEstimate.from_proto(run_pb2.CostEstimate(**fields))) == fields


def test_region_nobody_annotated() -> None:
    """A region without a verdict is open."""
    found = Region.from_proto(region())
    assert (found.id, found.run, found.annotation, found.state) == ("r1", "first", None, "open")
    assert (found.size, found.held_out_size, found.true_label, found.predicted_label) == (40, 12, "ant", "bee")
    assert found.error_rate == Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)


@pytest.mark.parametrize(
    ("verdict", "state"), [("LABEL", "labelled"), ("INVALID", "invalid"), ("MIXED", "mixed"), ("UNSURE", "unsure")]
)
def test_annotated_region(verdict: str, state: str) -> None:
    """The verdict is the state of a region; each verdict has a word."""
    message = annotation_pb2.Annotation(verdict=f"VERDICT_{verdict}", label="ant", annotator="ada", create_time=MOMENT)
    found = Region.from_proto(region(annotation=message))
    assert found.state == state
    assert found.annotation == Annotation(verdict=verdict.lower(), label="ant", annotator="ada", create_time=WHEN)


@pytest.mark.parametrize(("name", "parent"), [("r3", ""), ("r3-1", "r3"), ("r3-1-12", "r3-1")])
def test_a_part_knows_the_whole(name: str, parent: str) -> None:
    """The id of a part says which region it is a part of."""
    assert Region.from_proto(region_pb2.Region(name=f"runs/a-run/regions/{name}")).parent_region == parent


def test_pictures() -> None:
    """Pictures of a region are arrays."""
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    message = gateway_service_pb2.GetRegionResponse(
        region=region(), exemplars=tensors.images_to_proto(images), sources=tensors.images_to_proto(images[:1])
    )
    pictures = RegionPictures.from_proto(message)
    assert pictures.region.id == "r1"
    np.testing.assert_array_equal(pictures.exemplars, images)
    np.testing.assert_array_equal(pictures.sources, images[:1])


def test_correction() -> None:
    """A correction has plain ids and every figure of its result."""
    change = correction_pb2.RegionChange(
        region="runs/first/regions/r1",
        label="ant",
        before=HALF,
        after=HALF,
        exemplars_before=["bee"],
        exemplars_after=["ant"],
    )
    result = correction_pb2.CorrectionResult(
        regions=[change],
        test_before=HALF,
        parity=[{"batch_size": 2, "max_abs_difference": 1e-6}],
        candidate="tiny-candidate",
        candidate_version=3,
        choice={
            "rule": "the best",
            "method": "METHOD_INTERPOLATION",
            "region_weight": 0.5,
            "learning_rate": 0.1,
            "share": 1,
            "non_inferior": True,
        },
    )
    message = correction_pb2.Correction(
        name="runs/first/corrections/c1",
        model="models/tiny",
        base_version=1,
        state="STATE_SUCCEEDED",
        config={"region_weights": [0.3, 0.5], "methods": ["METHOD_ALL_WEIGHTS"], "augmentation": {"max_shift": 0.1}},
        trainings=[
            {"method": "METHOD_ALL_WEIGHTS", "region_weight": 0.3, "points": [{"share": 1, "test": HALF}]},
            {
                "method": "METHOD_INTERPOLATION",
                "region_weight": 0.5,
                "learning_rate": 0.1,
                "points": [{"share": 0.4}, {"share": 1, "test_change": CHANGE}],
            },
            {"method": "METHOD_LAST_LAYER"},
        ],
        result=result,
    )
    found = Correction.from_proto(message)
    assert (found.id, found.run, found.model, found.base_version) == ("c1", "first", "tiny", 1)
    assert (found.config["region_weights"], found.config["methods"]) == ([0.3, 0.5], ["all_weights"])
    assert found.config["augmentation"]["max_shift"] == 0.1
    assert [(point.method, point.region_weight, point.share, point.chosen) for point in found.points] == [
        ("all_weights", 0.3, 1.0, False),
        ("interpolation", 0.5, 0.4, False),
        ("all_weights", 0.5, 1.0, True),
    ]
    assert found.points[2].test_change == PairedDifference(
        value=-0.01, low=-0.03, high=0.01, gained=1, lost=2, trials=100, p_value=0.5
    )
    assert found.choice == Choice(
        rule="the best", method="all_weights", region_weight=0.5, learning_rate=0.1, share=1.0, non_inferior=True
    )
    assert (found.state, found.ended, found.candidate, found.candidate_version) == (
        "succeeded",
        True,
        "tiny-candidate",
        3,
    )
    assert (found.test_before.trials, found.test_after.trials, found.parity) == (16, 0, {2: 1e-6})
    [one] = found.regions
    assert (one.region, one.label, one.after.value) == ("r1", "ant", 0.5)
    assert (one.exemplars_before, one.exemplars_after) == (("bee",), ("ant",))


def test_a_correction_under_way_has_no_choice() -> None:
    """Before it has succeeded nothing is chosen; what was tried so far is there."""
    message = correction_pb2.Correction(
        name="runs/first/corrections/c1",
        model="models/tiny",
        state="STATE_RUNNING",
        trainings=[{"method": "METHOD_CONTINUED", "points": [{"share": 1}]}],
    )
    found = Correction.from_proto(message)
    assert (found.choice, found.ended) == (None, False)
    assert [(point.method, point.chosen) for point in found.points] == [("continued", False)]


WHO = {"actor": "anna", "reason": "bold sevens", "approver": "otto"}


@pytest.mark.parametrize("kind", ["REGISTERED", "RELEASED", "ROLLED_BACK"])
def test_release(kind: str) -> None:
    """A release says what happened in a word."""
    message = release_pb2.Release(
        model="models/tiny",
        kind=f"KIND_{kind}",
        version=2,
        previous_version=1,
        correction="c",
        verdict="models/tiny/verdicts/v",
        create_time=MOMENT,
        **WHO,
    )
    assert Release.from_proto(message) == Release(
        model="tiny",
        kind=kind.lower(),
        version=2,
        previous_version=1,
        correction="c",
        verdict="v",
        create_time=WHEN,
        **WHO,
    )


def test_values_cannot_be_changed() -> None:
    """A value is what the server said, for good."""
    with pytest.raises(AttributeError):
        Region.from_proto(region()).size = 1  # type: ignore[misc]
