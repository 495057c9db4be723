"""Regions and their annotations.

Each annotation is a stored object, and the latest of a region counts.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.errors import DeadlineExceeded, InvalidInput, Unavailable
from defuse.v1 import (
    annotation_pb2,
    correction_pb2,
    distiller_service_pb2,
    distiller_service_pb2_grpc,
    region_pb2,
    run_pb2,
)
from google.protobuf import json_format
from safetensors.numpy import save

from services.arrays import Array
from services.gateway.records.idempotency import claimed
from services.gateway.records.paging import Cursor, Page
from services.runtime.tls import ServiceClient
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

# Bytes of one message of a download.
_PART_BYTES = 1 << 20
_LABEL, _INVALID = annotation_pb2.Annotation.VERDICT_LABEL, annotation_pb2.Annotation.VERDICT_INVALID


@dataclass(frozen=True, kw_only=True)
class AnnotationImages:
    """The images that an annotator sees, (n, h, w, c) uint8 each."""

    exemplars: Array
    sources: Array
    nearest: Array
    nearest_misclassified: Array


@dataclass(frozen=True, kw_only=True)
class JudgedRegions:
    """The names of regions annotated as invalid, and with their sources' label."""

    invalid: Sequence[str]
    valid: Sequence[str]


class Regions:
    """Finds and annotates the regions of finished runs."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._catalog = Catalog(store)

    def distillation(self, run: run_pb2.Run) -> region_pb2.Distillation:
        """Return a run's annotated regions with their parts, by descending score."""
        found = self._store.read_message(keys.distillation(run.name), region_pb2.Distillation)
        del found.regions[:]
        found.regions.extend(self._catalog.regions(run.name))
        return found

    def page(self, run: run_pb2.Run, cursor: Cursor) -> tuple[Page[region_pb2.Region], region_pb2.GroupCounts]:
        """Return one page of a run's regions, and its group counts.

        Regions are sorted by descending score.
        """
        found = self.distillation(run)
        placed = cursor.after_cursor(found.regions, lambda region: [-region.score, region.name])
        return cursor.page(placed), found.counts

    def get(self, name: str) -> region_pb2.Region:
        return self._catalog.annotated(self._catalog.region(name))

    def parts(self, name: str) -> list[region_pb2.Region]:
        """Return the annotated parts of a split region, largest score first."""
        return [self._catalog.annotated(part) for part in self._catalog.parts(name)]

    def pictures(self, name: str) -> AnnotationImages:
        arrays = self._store.map_arrays(keys.region_arrays(name))
        return AnnotationImages(
            exemplars=arrays["exemplars"],
            sources=arrays["exemplar_sources"],
            nearest=arrays["nearest"],
            nearest_misclassified=arrays["nearest_misclassified"],
        )

    def export(self, run: run_pb2.Run) -> bytes:
        """Return a safetensors file with the arrays and records of all regions.

        The records are JSON metadata. The file is without annotations, and without the parts that follow from them. It
        is therefore the same at every call, and an interrupted download can be resumed.
        """
        distillation = self._store.read_message(keys.distillation(run.name), region_pb2.Distillation)
        arrays = {
            f"{names.last(region.name)}.{name}": np.ascontiguousarray(array)
            for region in distillation.regions
            for name, array in self._store.read_arrays(keys.region_arrays(region.name)).items()
        }
        record = json_format.MessageToJson(distillation, preserving_proto_field_name=True)
        return save(arrays, metadata={"distillation": record})

    def export_from(self, run: run_pb2.Run, offset: int) -> Iterator[bytes]:
        """Return the exported file from a byte offset on, in parts.

        Raises InvalidInput for a negative offset.
        """
        if offset < 0:
            raise InvalidInput(f"the offset is {offset}; give 0 or more bytes", reason="OUT_OF_BOUNDS", field="offset")
        content = self.export(run)
        return (content[begin : begin + _PART_BYTES] for begin in range(offset, len(content), _PART_BYTES))

    def annotate(self, annotation: annotation_pb2.Annotation) -> region_pb2.Region:
        """Store an annotation and return its region.

        Raises InvalidInput for a label that the model does not have.
        """
        region = self._catalog.region(annotation.region)
        self._check(annotation)
        stored = annotation_pb2.Annotation()
        stored.CopyFrom(annotation)
        stored.create_time.GetCurrentTime()
        directory, mark = keys.annotations(region.name), _mark()
        if not any(key.endswith(f"-{mark}.pb") for key in self._store.keys(directory)):
            # Nanoseconds come first, so that keys sort by time.
            self._store.write_message(f"{directory}/{time.time_ns():020d}-{mark}.pb", stored)
        return self.get(region.name)

    def labelled(self, run: run_pb2.Run) -> list[correction_pb2.LabelledRegion]:
        """Return the regions whose latest annotation is a label."""
        return [
            correction_pb2.LabelledRegion(region=region.name, label=region.annotation.label)
            for region in self.distillation(run).regions
            if region.annotation.verdict == _LABEL
        ]

    def judged(self, run: run_pb2.Run) -> JudgedRegions:
        """Return the regions whose annotation decides whether their failures are valid.

        Failures are valid when they show their label. A region with another label than
        its sources counts as neither: its images are valid, but not of that label.
        """
        regions = self.distillation(run).regions
        return JudgedRegions(
            invalid=[region.name for region in regions if region.annotation.verdict == _INVALID],
            valid=[
                region.name
                for region in regions
                if region.annotation.verdict == _LABEL and region.annotation.label == region.true_label
            ],
        )

    def _check(self, annotation: annotation_pb2.Annotation) -> None:
        if not annotation.verdict:
            raise InvalidInput(
                "the verdict is missing; give a label, or invalid, mixed or unsure",
                reason="BAD_VERDICT",
                field="annotation.verdict",
            )
        if annotation.verdict != _LABEL:
            return
        run = self._catalog.run(names.parent(annotation.region))
        classes = self._catalog.model(run.config.model).classes
        if annotation.label not in classes:
            raise InvalidInput(
                f"label {annotation.label!r} is no class of {names.last(run.config.model)!r}; its classes are "
                f"{', '.join(classes[:50])}",
                reason="LABELS_OUTSIDE_CLASSES",
                field="annotation.label",
            )


def _mark() -> str:
    """Return a unique suffix for an annotation.

    A retried request gets the same suffix, so that its annotation is stored once.
    """
    claim = claimed.get()
    return hashlib.sha256(claim.request_id.encode()).hexdigest()[:12] if claim else uuid.uuid4().hex[:12]


class Annotator:
    """Annotates regions, and makes the distiller split mixed ones."""

    def __init__(
        self, regions: Regions, distiller: "ServiceClient[distiller_service_pb2_grpc.DistillerServiceAsyncStub]"
    ) -> None:
        self._regions = regions
        self._distiller = distiller

    async def annotate(
        self, annotation: annotation_pb2.Annotation
    ) -> tuple[region_pb2.Region, Sequence[region_pb2.Region]]:
        """Store an annotation and return its region and the region's parts.

        Only a mixed region has parts, largest score first. The annotation is stored even when the split fails, and
        repeating it then completes it. Raises NotReady when the region cannot be split, and Unavailable or
        DeadlineExceeded when the distiller does not answer.
        """
        region = await asyncio.to_thread(self._regions.annotate, annotation)
        if annotation.verdict != annotation_pb2.Annotation.VERDICT_MIXED:
            return region, []
        await self._split(region.name)
        return region, await asyncio.to_thread(self._regions.parts, region.name)

    async def _split(self, name: str) -> None:
        wanted = distiller_service_pb2.SplitRegionRequest(region=name)
        try:
            await self._distiller.call(lambda stub, **how: stub.SplitRegion(wanted, **how))
        except (Unavailable, DeadlineExceeded) as error:
            raise type(error)(
                f"region {names.last(name)!r} is annotated as mixed, but not split yet ({error.message}); annotate it "
                "again when the distiller answers",
                reason=error.reason,
            ) from error
