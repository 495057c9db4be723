"""HTML of values for notebooks."""

import base64
import io
import re
from typing import Any

import numpy as np
from defuse import tensors
from defuse.v1 import correction_pb2, gate_pb2, region_pb2, run_pb2, tensor_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Correction, GateVerdict, Region, RegionPictures, Run
from PIL import Image

EVIL, ESCAPED = '<script>"&', "&lt;script&gt;&quot;&amp;"
HALF = tensor_pb2.Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)
RUN = run_pb2.Run(
    name="runs/first",
    state=run_pb2.Run.STATE_IDENTIFYING,
    progress=0.25,
    note=EVIL,
    config={"model": "models/tiny", "model_version": 3, "dataset": "datasets/d1"},
    counts=run_pb2.SearchCounts(sources=100, decodes=5000, failures=70),
)
VERDICT = gate_pb2.GateVerdict(
    name="models/tiny/verdicts/v1",
    base_version=3,
    dataset="datasets/d1",
    checks=[
        gate_pb2.Check(kind=gate_pb2.Check.KIND_TEST, figure=0.5, low=0.25, high=0.75, bound=-0.01, passed=True),
        gate_pb2.Check(kind=gate_pb2.Check.KIND_CLASS, subject=EVIL, figure=-0.125, bound=-0.05),
    ],
)


def region(**more: Any) -> region_pb2.Region:
    return region_pb2.Region(
        name="runs/first/regions/r1",
        true_label=EVIL,
        predicted_label="bee",
        score=0.125,
        size=40,
        error_rate=HALF,
        real_error_rate=HALF,
        suggested_label="ant",
        **more,
    )


def cells(html: str) -> list[str]:
    """Return the texts of all cells; fail for unexpected tags."""
    tags = set(re.findall(r"</?([a-z]+)", html))
    assert tags <= {"table", "caption", "tr", "th", "td", "p", "div", "img"}, tags
    return re.findall(r"<(?:td|th|caption)[^>]*>([^<]*)<", html)


def test_run() -> None:
    """State and counts are shown; empty values are omitted, texts are escaped."""
    shown = cells(Run.from_proto(RUN)._repr_html_())
    assert shown[:3] == ["run first", "state", "identifying, 25%"]
    assert "tiny, version 3" in shown
    assert "70 in 5000 perturbations of 100 images" in shown
    assert ESCAPED in shown
    assert "error" not in shown


def test_region() -> None:
    """Labels, figures and annotation are shown."""
    shown = cells(Region.from_proto(region())._repr_html_())
    assert shown[0] == "region r1 of run first"
    assert {
        ESCAPED,
        "bee",
        "0.125",
        "8 of 16 misclassified",
        "0.500 [0.250, 0.750] (n=16)",
        "open; suggested: ant",
    } <= {*shown}
    annotation = {"region": "runs/first/regions/r1", "verdict": 1, "label": EVIL, "annotator": EVIL}
    shown = cells(Region.from_proto(region(annotation=annotation))._repr_html_())
    assert f"{ESCAPED}, by {ESCAPED}" in shown


def test_pictures() -> None:
    """Each picture is a PNG of its pixels; empty rows are omitted."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 1), dtype=np.uint8)
    response = pb.GetRegionResponse(
        region=region(), exemplars=tensors.images_to_proto(images), sources=tensors.images_to_proto(255 - images)
    )
    html = RegionPictures.from_proto(response)._repr_html_()
    cells(html)
    found = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        for content in re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    ]
    np.testing.assert_array_equal(found, np.concatenate([images, 255 - images])[..., 0])
    assert f"source images, labelled {ESCAPED}" in html
    assert "nearest" not in html


def test_correction() -> None:
    """Choice, effects and verdict are shown."""
    result = correction_pb2.CorrectionResult(
        regions=[{"region": "runs/first/regions/r1", "label": EVIL, "before": HALF, "after": HALF}],
        choice={"method": 1, "region_weight": 0.3, "learning_rate": 1e-3, "share": 1.0},
        test_change={"value": 0.01, "low": -0.01, "high": 0.03, "trials": 100},
        verdict=VERDICT,
    )
    message = correction_pb2.Correction(
        name="runs/first/corrections/c1",
        model="models/tiny",
        base_version=3,
        state=correction_pb2.Correction.STATE_SUCCEEDED,
        result=result,
    )
    shown = cells(Correction.from_proto(message)._repr_html_())
    assert shown[0] == "correction c1 of run first"
    assert {"all_weights, lambda 0.3, rate 0.001", "+0.0100 [-0.0100, +0.0300]", "r1", ESCAPED, "gate v1"} <= {*shown}
    message.state, message.progress = correction_pb2.Correction.STATE_RUNNING, 0.5
    message.ClearField("result")
    shown = cells(Correction.from_proto(message)._repr_html_())
    assert "running, 50%" in shown
    assert "chosen" not in shown


def test_verdict() -> None:
    """Every check is shown with figure, bound and outcome."""
    shown = cells(GateVerdict.from_proto(VERDICT)._repr_html_())
    assert shown[:3] == ["gate v1", "verdict", "not passed: 1 of 2 checks"]
    rows = [shown[begin : begin + 5] for begin, cell in enumerate(shown) if cell in {"yes", "no"}]
    assert rows == [["yes", "test", "", "0.5 [0.25, 0.75]", "-0.01"], ["no", "class", ESCAPED, "-0.125", "-0.05"]]
