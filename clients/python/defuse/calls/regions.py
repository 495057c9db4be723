"""Regions: listed, looked at, compared, exported, annotated."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.calls.pages import listed
from defuse.calls.requests import new_id
from defuse.errors import InvalidInput
from defuse.steps import Call, Steps, Stream, User, Work
from defuse.v1 import annotation_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Region, RegionPictures, RegionsDiff

_VERDICTS = {"label", "invalid", "mixed", "unsure"}
# A region that is mixed is split before the answer comes.
_SPLIT_DEADLINE_S = 150.0
# Runs with VAEs of their own are compared by decoding and encoding.
_DIFF_DEADLINE_S = 120.0


def regions(run_id: str) -> Steps[list[Region]]:
    """Return the regions of a run by score, descending; those that are mixed come with their parts."""
    found = yield from listed("ListRegions", pb.ListRegionsRequest(run=names.run(run_id)), "regions")
    return [Region.from_proto(message) for message in found]


def region(run_id: str, region_id: str) -> Steps[RegionPictures]:
    """Return a region with pictures."""
    answer = yield Call(method="GetRegion", request=pb.GetRegionRequest(name=names.region(run_id, region_id)))
    return RegionPictures.from_proto(answer)


def sample_region(run_id: str, region_id: str, count: int = 16, *, seed: int = 0) -> Steps[npt.NDArray[np.uint8]]:
    """Draw fresh images (count, h, w, c) from a region."""
    request = pb.SampleRegionImagesRequest(region=names.region(run_id, region_id), count=count, seed=seed)
    answer = yield Call(method="SampleRegionImages", request=request)
    return tensors.images_from_proto(answer.images)


def diff_regions(before: str, after: str) -> Steps[RegionsDiff]:
    """Say which regions of the run `after` are new, gone or moved, beside those of the run `before`."""
    request = pb.DiffRegionsRequest(before=names.run(before), after=names.run(after))
    answer = yield Call(method="DiffRegions", request=request, timeout_s=_DIFF_DEADLINE_S)
    return RegionsDiff.from_proto(answer.diff)


def export_regions(run_id: str, file: Path) -> Steps[Path]:
    """Write the regions of a run to a safetensors file: arrays by `{region}.{name}`, records as JSON metadata.

    Annotations are not in it, nor the parts of mixed regions.
    """
    request = pb.ExportRegionsRequest(run=names.run(run_id))
    parts: list[bytes] = []

    def read(answer: pb.ExportRegionsResponse) -> None:
        parts.append(answer.data)
        request.offset += len(answer.data)

    yield Stream(method="ExportRegions", request=request, read=read)
    yield Work(function=lambda: file.write_bytes(b"".join(parts)))
    return file


def annotate(
    run_id: str, region_id: str, *, label: str = "", verdict: str = "label", annotator: str | None = None
) -> Steps[Region]:
    """Say what a region shows: a label, or the verdict invalid, mixed or unsure.

    One that is mixed is split into parts, `r3-1` of `r3` and so on, which `regions` lists. Raises NotReady where it
    has none; the verdict is stored all the same.
    """
    if verdict not in _VERDICTS:
        raise InvalidInput(f"verdict {verdict!r} is unknown; use one of {', '.join(sorted(_VERDICTS))}")
    annotation = annotation_pb2.Annotation(
        region=names.region(run_id, region_id),
        verdict=annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{verdict.upper()}"),
        label=label,
        annotator=annotator or (yield User()),
    )
    answer = yield Call(
        method="AnnotateRegion",
        request=pb.AnnotateRegionRequest(annotation=annotation, request_id=new_id()),
        timeout_s=_SPLIT_DEADLINE_S if verdict == "mixed" else None,
    )
    return Region.from_proto(answer.region)
