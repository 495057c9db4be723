"""Calls for regions, annotations and the latent space."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.calls.sans_io import (
    BlockingWork,
    CurrentUser,
    Rpc,
    SansIoCall,
    StreamRpc,
    list_all_pages,
    new_request_id,
)
from defuse.errors import InvalidInput
from defuse.v1 import annotation_pb2, generator_service_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Images, Interpolation, Region, RegionPictures, RegionsDiff

_VERDICTS = {"label", "invalid", "mixed", "unsure"}
# A mixed region is split before the response.
_SPLIT_DEADLINE_S = 150.0
# Runs with different VAEs are compared by decoding and encoding.
_DIFF_DEADLINE_S = 120.0


def regions(run_id: str) -> SansIoCall[list[Region]]:
    """Return the regions of a run, largest score first.

    The list includes the parts of mixed regions.
    """
    messages = yield from list_all_pages("ListRegions", pb.ListRegionsRequest(run=names.run(run_id)), "regions")
    return [Region.from_proto(message) for message in messages]


def region(run_id: str, region_id: str) -> SansIoCall[RegionPictures]:
    """Return a region with pictures."""
    response = yield Rpc(method="GetRegion", request=pb.GetRegionRequest(name=names.region(run_id, region_id)))
    return RegionPictures.from_proto(response)


def sample_region(run_id: str, region_id: str, count: int = 16, *, seed: int = 0) -> SansIoCall[npt.NDArray[np.uint8]]:
    """Draw new images (count, h, w, c) uint8 from a region."""
    request = pb.SampleRegionImagesRequest(region=names.region(run_id, region_id), count=count, seed=seed)
    response = yield Rpc(method="SampleRegionImages", request=request)
    return tensors.images_from_proto(response.images)


def diff_regions(before: str, after: str) -> SansIoCall[RegionsDiff]:
    """Compare the regions of two runs: added, gone, moved or unchanged."""
    request = pb.DiffRegionsRequest(before=names.run(before), after=names.run(after))
    response = yield Rpc(method="DiffRegions", request=request, timeout_s=_DIFF_DEADLINE_S)
    return RegionsDiff.from_proto(response.diff)


def export_regions(run_id: str, file: Path) -> SansIoCall[Path]:
    """Write the regions of a run to a safetensors file.

    Arrays are named `{region}.{name}`, records are JSON metadata. The file has neither annotations nor the parts of
    mixed regions. Returns its path.
    """
    request = pb.ExportRegionsRequest(run=names.run(run_id))
    pieces: list[bytes] = []

    def parse(response: pb.ExportRegionsResponse) -> None:
        pieces.append(response.data)
        request.offset += len(response.data)

    yield StreamRpc(method="ExportRegions", request=request, parse=parse)
    yield BlockingWork(function=lambda: file.write_bytes(b"".join(pieces)))
    return file


def annotate(
    run_id: str, region_id: str, *, label: str = "", verdict: str = "label", annotator: str | None = None
) -> SansIoCall[Region]:
    """Annotate a region with a label or another verdict.

    `verdict` is label, invalid, mixed or unsure. A mixed region such as `r3` is split into parts `r3-1`, `r3-2` and so
    on, which `regions` lists. `annotator` is the user by default. Raises NotReady if the region cannot be split; the
    verdict is stored nevertheless.
    """
    if verdict not in _VERDICTS:
        raise InvalidInput(f"verdict {verdict!r} is unknown; use one of {', '.join(sorted(_VERDICTS))}")
    annotation = annotation_pb2.Annotation(
        region=names.region(run_id, region_id),
        verdict=annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{verdict.upper()}"),
        label=label,
        annotator=annotator or (yield CurrentUser()),
    )
    response = yield Rpc(
        method="AnnotateRegion",
        request=pb.AnnotateRegionRequest(annotation=annotation, request_id=new_request_id()),
        timeout_s=_SPLIT_DEADLINE_S if verdict == "mixed" else None,
    )
    return Region.from_proto(response.region)


def encode(run_id: str, images: Images) -> SansIoCall[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Return means and standard deviations (n, d) of images' posteriors.

    `images` is (n, h, w, c) uint8.
    """
    request = generator_service_pb2.EncodeRequest(run=names.run(run_id), images=tensors.images_to_proto(images))
    response = yield Rpc(method="Encode", request=request)
    return tensors.floats_from_proto(response.mu), tensors.floats_from_proto(response.sigma)


def decode(
    run_id: str, latents: npt.NDArray[np.floating], *, sources: Sequence[int] | npt.NDArray[np.integer] = ()
) -> SansIoCall[Images]:
    """Return the images (n, h, w, c) uint8 of latents (n, d), rendered as the run does.

    A run with the rendering `residual` needs their `sources`, as `Failure.source`.
    """
    request = generator_service_pb2.DecodeRequest(
        run=names.run(run_id), latents=tensors.floats_to_proto(latents), sources=[int(source) for source in sources]
    )
    response = yield Rpc(method="Decode", request=request)
    return tensors.images_from_proto(response.images)


def interpolate(run_id: str, first: Images, last: Images, *, frames: int = 30) -> SansIoCall[Interpolation]:
    """Interpolate between two images in latent space.

    Both images are (h, w, c) uint8. `frames` includes both ends.
    """
    ends = tensors.images_to_proto(np.stack([first, last]))  # (2, h, w, c)
    request = generator_service_pb2.InterpolateRequest(run=names.run(run_id), ends=ends, frames=frames)
    response = yield Rpc(method="Interpolate", request=request)
    images = tensors.images_from_proto(response.images)
    return Interpolation(images=images, predicted_labels=tuple(response.predicted_labels))
