"""The gate on a real Triton: candidates as good as the champion pass, each made worse is stopped for it."""

import hashlib
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from defuse.errors import InvalidInput, NotFound, NotReady
from defuse.v1 import annotation_pb2, correction_pb2, dataset_pb2, gate_pb2, region_pb2

from services.corrector.gate import comparison
from services.corrector.gate.comparison import IMAGES, RegressionBank
from services.corrector.gate.decision import Gate
from services.corrector.own_triton import Releases
from services.corrector.triton_repository import TritonRepository
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.triton.client import InferenceClient
from tests.unit.corrector import corrections
from tests.unit.corrector.corrections import CLASSES, DATASET, MODEL, REGIONS, RUN, brightest

TEST_IMAGES = 3000
# The bright column of the second region, where one candidate is wrong.
CORNER = (0.3, 0.8, 0.3) * 2


def candidate(nodes: str = "logits = Identity(scores)", *, output: str = "logits", **constants: object) -> bytes:
    """Return what scores a class by the brightness of its column, followed by nodes that make it worse."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]>'
        f"g (float[n,1,2,3] images) => (float[n,3] {output}) "
        f"{{ flat = Flatten(images) scores = MatMul(flat, columns) {nodes} }}"
    )
    columns = np.tile(np.eye(3), 2).T * 12
    for name, value in {"columns": columns, **constants}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    return bytes(model.SerializeToString())


def slow() -> bytes:
    wide = np.random.default_rng(0).standard_normal((6, 2000)) / 100
    square = np.random.default_rng(0).standard_normal((2000, 2000)) / 100
    return candidate(
        "a = MatMul(flat, wide) b = MatMul(a, square) c = MatMul(b, square) d = MatMul(c, square) "
        "e = MatMul(d, nothing) logits = Add(scores, e)",
        wide=wide,
        square=square,
        nothing=np.zeros((2000, 3)),
    )


def wrong_in_one_place() -> bytes:
    return candidate(
        "apart = Sub(flat, corner) far = Abs(apart) distance = MatMul(far, ones) near = Sub(reach, distance) "
        "inside = Relu(near) loss = MatMul(inside, middle) logits = Sub(scores, loss)",
        corner=[CORNER],
        ones=np.ones((6, 1)),
        reach=0.5,
        middle=[[0, 1000, 0]],
    )


WORSE = {
    "class": candidate("logits = Sub(scores, bias)", bias=[0, 0, 2]),
    "calibration": candidate("logits = Mul(scores, factor)", factor=0.02),
    "region": wrong_in_one_place(),
    "latency": slow(),
    "parity": candidate(
        "axis = Constant<value_ints = [0]>() mean = ReduceMean<keepdims = 1>(scores, axis) logits = Sub(scores, mean)"
    ),
    "file": candidate("logits = Div(scores, zero)", zero=0),
}


@dataclass(frozen=True, kw_only=True)
class House:
    """A registered model with a run, two labelled regions and a gate."""

    store: ArtifactStore
    gate: Gate

    def judge(self, file: bytes, dataset: str = "") -> gate_pb2.GateVerdict:
        digest = hashlib.sha256(file).hexdigest()
        self.store.write_bytes(keys.file(digest), file)
        return self.gate.judge_file(MODEL, digest, dataset)


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory,
    triton_root: Path,
    inference: InferenceClient,
    repository: TritonRepository,
) -> House:
    store = ArtifactStore(f"file://{tmp_path_factory.mktemp('gate')}/store")
    releases = Releases(store, inference, triton_root / "models")
    corrections.build(store, file=candidate())
    pixels = np.random.default_rng(1).integers(256, size=(TEST_IMAGES, 6), dtype=np.uint8)
    store.write_arrays(keys.split(DATASET, "test"), {"x": pixels.reshape(-1, 2, 3, 1), "y": brightest(pixels)})
    regions = [region_pb2.Region(name=name, score=1 / rank) for rank, name in enumerate(REGIONS, start=1)]
    store.write_message(keys.distillation(RUN), region_pb2.Distillation(run=RUN, regions=regions))
    for name, label in zip(REGIONS, CLASSES, strict=False):
        verdict = annotation_pb2.Annotation(region=name, verdict="VERDICT_LABEL", label=label)
        store.write_message(f"{keys.annotations(name)}/1.pb", verdict)
    model = Catalog(store).model(MODEL)
    repository.add_version("tiny", 1, candidate())
    repository.serve(model, "tiny", [1])
    return House(store=store, gate=Gate(store, releases))


@pytest.fixture(autouse=True)
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every request take the same time, but in the test of a slower file: load can slow either version."""
    if "latency" not in request.node.name:
        ticks = itertools.count()
        clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: float(next(ticks)))
        monkeypatch.setattr(comparison, "time", clock)


def failed_kinds(verdict: gate_pb2.GateVerdict) -> set[str]:
    failed = [check.kind for check in verdict.checks if not check.passed]
    return {gate_pb2.Check.Kind.Name(kind).removeprefix("KIND_").lower() for kind in failed}


def test_the_same_file_passes_every_check(house: House) -> None:
    """Everything is asked, and the verdict is kept under its name."""
    verdict = house.judge(candidate())
    assert failed_kinds(verdict) == set()
    assert verdict.passed
    asked = {gate_pb2.Check.Kind.Name(check.kind).removeprefix("KIND_").lower() for check in verdict.checks}
    assert asked == {"file", "test", "class", "calibration", "region", "parity", "latency"}
    assert {check.subject for check in verdict.checks if check.kind == gate_pb2.Check.KIND_REGION} == set(REGIONS)
    assert Catalog(house.store).verdict(verdict.name) == verdict
    assert (verdict.base_version, verdict.dataset) == (1, DATASET)


@pytest.mark.parametrize("kind", WORSE)
def test_what_is_worse_in_one_way_is_stopped_for_it(house: House, kind: str) -> None:
    """One class, calibration, one region, latency, a batch that changes answers, answers that are no numbers."""
    verdict = house.judge(WORSE[kind])
    assert not verdict.passed
    assert kind in failed_kinds(verdict)
    # A class that loses is a loss of the test split as well; nothing else is.
    assert failed_kinds(verdict) <= {kind, "test"} if kind in {"class", "calibration", "region"} else True


@pytest.mark.parametrize(("slow_series", "stopped"), [(1, set()), (2, set()), (6, {"latency"})])
def test_load_that_slows_a_version_for_a_while(
    house: House, monkeypatch: pytest.MonkeyPatch, slow_series: int, stopped: set[str]
) -> None:
    """A candidate is stopped when it is slower in each of three series, and measured at each of two batch sizes."""
    factors = itertools.chain(itertools.repeat(2.0, slow_series), itertools.repeat(1.0))
    monkeypatch.setattr(comparison, "measure_latency", lambda *_: (np.ones(60), np.full(60, next(factors))))
    assert failed_kinds(house.judge(candidate())) == stopped


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"no model", "no ONNX model"),
        (candidate("answer = Identity(scores)", output="answer"), "output's name of the file is answer"),
        (candidate("logits = MatMul(scores, fewer)", fewer=np.eye(3, 2)), "answers (2, 2)"),
    ],
    ids=["not ONNX", "another output", "another class count"],
)
def test_a_broken_file_is_a_verdict(house: House, file: bytes, words: str) -> None:
    """A call in a pipeline gets a verdict, not an error."""
    verdict = house.judge(file)
    assert (verdict.passed, failed_kinds(verdict)) == (False, {"file"})
    assert words in verdict.checks[0].rule


def test_images_of_another_kind_are_an_error(house: House) -> None:
    """The candidate is not to blame for a data set that nobody could be asked about."""
    record = dataset_pb2.Dataset(name="datasets/large", label_count=3, image_shape=[8, 8, 1])
    house.store.write_message(keys.dataset(record.name), record)
    with pytest.raises(InvalidInput, match="8x8x1"):
        house.judge(candidate(), record.name)


def test_what_is_not_there_is_an_error(house: House) -> None:
    """An unknown model, file or data set is nothing that a candidate can be blamed for."""
    with pytest.raises(NotFound):
        house.gate.judge_file("models/unknown", "0" * 64)
    with pytest.raises(NotFound):
        house.gate.judge_file(MODEL, "0" * 64)
    with pytest.raises(NotFound):
        house.judge(candidate(), "datasets/unknown")


def test_a_bank_has_the_same_images_for_ever(house: House) -> None:
    """They are drawn once, and carry the region's label."""
    house.judge(candidate())
    model = Catalog(house.store).model(MODEL)
    bank = RegressionBank(house.store, model)
    assert bank.regions() == dict(zip(REGIONS, CLASSES, strict=False))
    images = bank.images(REGIONS[1], CLASSES[1])
    assert images.shape == (IMAGES, 2, 3, 1)
    assert (brightest(images.reshape(IMAGES, 6)) == 1).mean() > 0.95
    assert len(np.unique(images, axis=0)) == IMAGES
    assert np.array_equal(images, RegressionBank(house.store, model).images(REGIONS[1], CLASSES[1]))


def test_a_release_needs_the_gate_or_an_approver(house: House) -> None:
    """A verdict that does not know a region labelled since is given anew; one that is not passed names what failed."""
    correction = correction_pb2.Correction(name=f"{RUN}/corrections/c1", model=MODEL, base_version=1)
    correction.config.margin = 0.01
    for name, label in zip(REGIONS, CLASSES, strict=False):
        correction.regions.add(region=name, label=label)
    house.store.write_bytes(keys.corrected_file(correction.name), candidate())
    with pytest.raises(NotReady, match="region gain"):
        house.gate.require_passed(correction)
    with pytest.raises(NotReady, match="give an approver"):
        house.gate.require_passed(correction, approver="anna")
    verdict = house.gate.require_passed(correction, approver="anna", reason="a drill")
    assert failed_kinds(verdict) == {"region_gain"}

    verdict.passed = True
    house.store.write_message(keys.verdict(verdict.name), verdict)
    assert house.gate.require_passed(correction) == verdict
    other = annotation_pb2.Annotation(region=REGIONS[0], verdict="VERDICT_LABEL", label=CLASSES[2])
    house.store.write_message(f"{keys.annotations(REGIONS[0])}/2.pb", other)
    with pytest.raises(NotReady, match="region gain"):
        house.gate.require_passed(correction)
