import pytest
from defuse.errors import InvalidInput
from defuse.v1.correction_pb2 import CorrectionConfig, Training

from services.gateway.corrections.config import complete, trainings


def test_defaults() -> None:
    """Missing settings take their defaults; epochs 0 are left to the corrector."""
    whole = complete(CorrectionConfig(seed=9))
    assert list(whole.region_weights)
    assert list(whole.methods)
    assert list(whole.learning_rates)
    assert whole.margin > 0
    assert whole.images_per_region > 0
    assert (whole.epochs, whole.seed) == (0, 9)


def test_what_is_set_stays() -> None:
    """A complete configuration comes back as it is; lambdas in ascending order, nothing twice."""
    given = CorrectionConfig(
        region_weights=[0.0, 0.5],
        methods=[Training.METHOD_CONTINUED],
        epochs=7,
        learning_rates=[0.1],
        margin=0.2,
        images_per_region=3,
        seed=1,
        augmentation={"max_shift": 0.1},
    )
    assert complete(given) == given
    twice = complete(CorrectionConfig(region_weights=[0.5, 0.0, 0.5], methods=[Training.METHOD_LAST_LAYER] * 2))
    assert (list(twice.region_weights), list(twice.methods)) == ([0.0, 0.5], [Training.METHOD_LAST_LAYER])


def test_each_method_is_tried_with_each_lambda_that_it_has() -> None:
    """Interpolation makes its curve from the training with the largest lambda, which is not made twice."""
    config = CorrectionConfig(
        region_weights=[0.2, 0.4],
        learning_rates=[0.1],
        methods=[
            Training.METHOD_ALL_WEIGHTS,
            Training.METHOD_LAST_LAYER,
            Training.METHOD_INTERPOLATION,
            Training.METHOD_UNCLUSTERED,
            Training.METHOD_CONTINUED,
        ],
    )
    assert [(Training.Method.Name(one.method)[7:], one.region_weight) for one in trainings(complete(config))] == [
        ("ALL_WEIGHTS", 0.2),
        ("LAST_LAYER", 0.2),
        ("LAST_LAYER", 0.4),
        ("INTERPOLATION", 0.4),
        ("UNCLUSTERED", 0.2),
        ("UNCLUSTERED", 0.4),
        ("CONTINUED", 0.0),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("margin", 1.5),
        ("margin", float("nan")),
        ("images_per_region", -1),
        ("unclustered_failures", -3),
    ],
)
def test_values_out_of_their_bounds_are_refused_by_name(name: str, value: float) -> None:
    """A value outside its bounds is refused with its name and itself."""
    with pytest.raises(InvalidInput, match=f"{name} is {value}") as caught:
        complete(CorrectionConfig(**{name: value}))
    assert caught.value.field == f"config.{name}"


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_a_lambda_out_of_its_bounds(value: float) -> None:
    """Lambda is called lambda, wherever it stands."""
    with pytest.raises(InvalidInput, match=f"lambda is {value}"):
        complete(CorrectionConfig(region_weights=[0.5, value]))


@pytest.mark.parametrize("value", [2.0, 0.0, -1e-9, float("nan")])
def test_a_learning_rate_out_of_its_bounds(value: float) -> None:
    """It is refused with its value."""
    with pytest.raises(InvalidInput, match=f"learning rate is {value}"):
        complete(CorrectionConfig(learning_rates=[0.5, value]))


def test_each_learning_rate_is_tried() -> None:
    """Every method is trained at every rate, ascending."""
    config = CorrectionConfig(
        region_weights=[0.2],
        learning_rates=[0.1, 0.01],
        methods=[Training.METHOD_ALL_WEIGHTS, Training.METHOD_CONTINUED],
    )
    assert [one.learning_rate for one in trainings(complete(config))] == [0.01, 0.1, 0.01, 0.1]


@pytest.mark.parametrize(("name", "value"), [("max_shift", 1.5), ("max_shift", -0.1), ("max_rotation_degrees", 181.0)])
def test_an_augmentation_out_of_its_bounds(name: str, value: float) -> None:
    """It is refused with its path."""
    with pytest.raises(InvalidInput, match=f"augmentation.{name} is {value}"):
        complete(CorrectionConfig(augmentation={name: value}))


def test_weights_without_a_factory_are_refused() -> None:
    """Nobody could take them."""
    with pytest.raises(InvalidInput, match="module:function"):
        complete(CorrectionConfig(torch_factory={"weights_digest": "abc"}))


def test_unknown_methods_are_refused() -> None:
    """A number that the contract does not name, or none, is no method."""
    for number in (0, 99):
        with pytest.raises(InvalidInput, match=f"method {number} is unknown"):
            complete(CorrectionConfig(methods=[number]))  # type: ignore[list-item]  # any number can be sent


def test_more_than_can_be_tried_is_refused() -> None:
    """A sweep that would take days is refused with its size."""
    with pytest.raises(InvalidInput, match="101 trainings; at most 100"):
        complete(
            CorrectionConfig(
                region_weights=[number / 200 for number in range(101)],
                learning_rates=[0.1],
                methods=[Training.METHOD_ALL_WEIGHTS],
            )
        )
