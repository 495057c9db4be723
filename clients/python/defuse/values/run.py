"""A run and what its search counted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Self

from defuse import names
from defuse.v1 import run_pb2
from defuse.values.plain import moment, settings, word


@dataclass(frozen=True, kw_only=True)
class SearchCounts:
    """What a search tried and found."""

    sources: int
    sources_wrong_on_image: int
    sources_wrong_on_reconstruction: int
    decodes: int
    candidates: int
    rejected_by_label_model: int
    rejected_by_source_limit: int
    failures: int

    @classmethod
    def from_proto(cls, message: run_pb2.SearchCounts) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of the loop. `state` is preparing, identifying, distilling, succeeded, failed or cancelled."""

    id: str
    state: str
    model: str
    model_version: int
    dataset: str
    seed: int
    # Share of the present stage that is done.
    progress: float
    note: str
    error: str
    counts: SearchCounts
    region_count: int
    config: Mapping[str, Any]
    create_time: datetime
    update_time: datetime

    @classmethod
    def from_proto(cls, message: run_pb2.Run) -> Self:
        config = message.config
        return cls(
            id=names.last(message.name),
            state=word(run_pb2.Run.State.Name(message.state), "STATE"),
            model=names.last(config.model),
            model_version=config.model_version,
            dataset=names.last(config.dataset),
            seed=config.seed,
            progress=message.progress,
            note=message.note,
            error=message.error,
            counts=SearchCounts.from_proto(message.counts),
            region_count=message.region_count,
            config={section: settings(getattr(config, section)) for section in ("search", "vae", "mixture")},
            create_time=moment(message.create_time),
            update_time=moment(message.update_time),
        )

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}
