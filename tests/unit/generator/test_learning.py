import numpy as np
import pytest
from defuse.errors import NotFound
from defuse.v1 import region_pb2, run_pb2

from services.gateway.runs.config import complete
from services.generator.run_context import fit_run_thresholds
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.storage.safetensors import join_groups

RUN = "runs/first"
GOOD, BAD = f"{RUN}/regions/r1", f"{RUN}/regions/r2"


@pytest.fixture
def reader(store: ArtifactStore) -> Catalog:
    """Leave a run whose region r2 has half as typical failures as r1; a quarter of both is held out."""
    config = complete(run_pb2.RunConfig(search={"rendering": "RENDERING_DECODER"}, validity={"max_round_trip_sd": 0.7}))
    store.write_message(keys.run(RUN), run_pb2.Run(name=RUN, config=config))
    random = np.random.default_rng(0)
    latent = random.standard_normal((80, 3)).astype(np.float32)
    bad = np.arange(80) % 2 == 1
    failures = {
        "latent": latent,
        "source": np.arange(80),
        "round": np.zeros(80, int),
        "draw": np.zeros(80, int),
        "label_probability": np.full(80, 0.999),
        "neighbour_agreement": np.full(80, 0.9),
        "typicality": np.where(bad, 0.3, 0.6),
        "round_trip_sd": np.full(80, 0.4),
        "radius_sd": np.full(80, 0.5),
    }
    store.write_arrays(keys.shard_result(RUN, 0, 0), join_groups(failures=failures))
    for name, rows in ((GOOD, np.flatnonzero(~bad)), (BAD, np.flatnonzero(bad))):
        arrays = {"latent": latent[rows[10:]], "held_out_latent": latent[rows[:10]]}
        store.write_arrays(keys.region_arrays(name), arrays)
    regions = [region_pb2.Region(name=name) for name in (GOOD, BAD)]
    store.write_message(keys.distillation(RUN), region_pb2.Distillation(regions=regions))
    return Catalog(store)


def test_what_verdicts_teach(reader: Catalog) -> None:
    """The signal that sets the invalid region apart gets its threshold; the others are those that the run had."""
    advice = fit_run_thresholds(reader, RUN, invalid=[BAD], valid=[GOOD])
    had = reader.run(RUN).config.validity
    assert advice.validity.min_typicality == pytest.approx(0.45)
    assert advice.validity.max_round_trip_sd == 0.7
    advice.validity.min_typicality, advice.validity.label_model = had.min_typicality, had.label_model
    assert advice.validity == had
    assert (advice.invalid_rejected, advice.valid_rejected) == pytest.approx((1.0, 0.0))
    assert (advice.invalid_regions, advice.valid_regions) == (1, 1)


def test_an_unknown_region(reader: Catalog) -> None:
    """A region that the run does not have is named."""
    with pytest.raises(NotFound, match=r"no region 'r9'; it has: r1, r2"):
        fit_run_thresholds(reader, RUN, invalid=[f"{RUN}/regions/r9"], valid=[GOOD])
