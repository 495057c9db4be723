"""Reads what people's verdicts on the regions of a run teach of its validity thresholds."""

from collections.abc import Sequence
from dataclasses import asdict

from defuse.v1 import run_pb2

from services.generator.feedback import advise
from services.generator.workbench import thresholds_of
from services.storage.catalog import Catalog


def learn(reader: Catalog, run_name: str, *, invalid: Sequence[str], valid: Sequence[str]) -> run_pb2.ValidityAdvice:
    """Return thresholds that would have kept invalid regions of a run out; raise NotFound for unknown ones."""
    run = reader.run(run_name)
    for name in (*invalid, *valid):
        reader.region(name)
    signals = list(reader.region_failures(run_name, [*invalid, *valid]))
    advice = advise(signals[: len(invalid)], signals[len(invalid) :], thresholds_of(run.config.validity))
    return run_pb2.ValidityAdvice(
        validity=run_pb2.ValidityConfig(**asdict(advice.thresholds)),
        invalid_rejected=advice.invalid_rejected,
        valid_rejected=advice.valid_rejected,
        invalid_regions=len(invalid),
        valid_regions=len(valid),
    )
