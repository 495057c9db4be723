"""The report has medians of the arms of one state of the code."""

import json
from pathlib import Path
from typing import Any

from benchmarks.planted.arm import ArmSettings
from benchmarks.planted.report import median, read_results, report


def result(seed: int, recall: float, **figures: Any) -> dict[str, Any]:
    baselines = {"jitter": {"spots": [0.3, 0.5], "clean_change": 0.01}}
    return {
        "data": "mnist",
        "seed": seed,
        "plant": "mislabelled",
        "rendering": "auto",
        "rendering_used": "decoder",
        "kinds": [],
        "smoke": False,
        "digest": "abc",
        "state": "succeeded",
        "error_reason": "",
        "spots": [{"kind": "slant"}, {"kind": "size"}],
        "recall": recall,
        "ranks": [1, None],
        "false_regions": None,
        "spots_before": [0.1, 0.2],
        "spots_after": [0.8, 0.6],
        "ceiling": [0.9, 0.9],
        "baselines": baselines,
        "seconds": {"identifying": 10.0 * seed},
        **figures,
    }


def test_a_median_leaves_out_what_was_not_measured() -> None:
    assert median([1.0, None, 4.0, 2.0]) == 2.0
    assert median([None]) is None


def test_the_report_has_medians_by_data_and_rendering() -> None:
    found = report(
        [
            result(3, 1.0),
            result(1, 0.0),
            result(2, 0.5, false_regions=0.25),
            result(1, 1.0, rendering="residual"),
            result(1, 1.0, plant="absent", lift=[0.1, 0.3], jitter_lift=[0.0, 0.1]),
            result(1, 1.0, kinds=["occlusion"]),
        ]
    )
    assert set(found) == {"mnist", "mnist absent", "mnist occlusion"}
    assert set(found["mnist"]) == {"auto", "residual"}
    auto = found["mnist"]["auto"]
    assert auto["seeds"] == [1, 2, 3]
    assert auto["recall"] == 0.5
    assert auto["false_regions"] == 0.25
    assert auto["planted_share"] is None
    assert auto["ranks"] == [[1, None]] * 3
    assert auto["spots_after"] == 0.7
    assert auto["worst_after"] == 0.6
    assert auto["baselines"]["jitter"] == {"spots": 0.4, "worst": 0.3, "clean_change": 0.01, "ahead": 0.3}
    assert auto["seconds"] == {"identifying": 20.0}
    assert auto["by_kind"]["slant"] == {
        "spots": 3,
        "found": 3,
        "spots_before": 0.1,
        "spots_after": 0.8,
        "ceiling": 0.9,
    }
    assert auto["by_kind"]["size"]["found"] == 0
    assert found["mnist absent"]["auto"]["lift"] == 0.2


def test_results_of_other_code_are_counted_but_not_read(tmp_path: Path) -> None:
    for number, figures in enumerate(({}, {"digest": "old"}, {"smoke": True})):
        (tmp_path / f"{number}.json").write_text(json.dumps(result(0, 1.0, **figures)))
    found, others = read_results(tmp_path, digest="abc", smoke=False)
    assert (len(found), others) == (1, 1)


def test_each_arm_has_a_file_of_its_own(tmp_path: Path) -> None:
    arms = [
        ArmSettings(source="mnist", seed=0),
        ArmSettings(source="mnist", seed=1),
        ArmSettings(source="mnist", seed=0, rendering="decoder"),
        ArmSettings(source="mnist", seed=0, plant="absent"),
        ArmSettings(source="mnist", seed=0, kinds=("slant",)),
        ArmSettings(source="mnist", seed=0, smoke=True),
    ]
    assert len({arm.file(tmp_path) for arm in arms}) == len(arms)
