"""A region whose images show several classes becomes parts, regions of their own."""

from collections.abc import Sequence

from defuse import names
from defuse.errors import NotReady
from defuse.v1 import region_pb2

from services.distiller.assessing import Assessor, Tools, counts
from services.distiller.splitting import split
from services.distiller.surroundings import shard_count
from services.runtime.worker import Job
from services.storage import keys
from services.storage.catalog import Catalog


def split_region(tools: Tools, name: str) -> Sequence[region_pb2.Region]:
    """Return the parts of a region, largest score first; one that is split already is not split again.

    Raises NotFound for an unknown region, NotReady where it has no parts that can be told or that are worse than their
    controls.
    """
    region, key = Catalog(tools.store).region(name), keys.parts(name)
    if not tools.store.exists(key):
        # Created, as a distillation is: two annotators may ask at the same moment.
        tools.store.create_bytes(key, _split(tools, region).SerializeToString(deterministic=True))
    return tools.store.read_message(key, region_pb2.Distillation).regions


def _split(tools: Tools, region: region_pb2.Region) -> region_pb2.Distillation:
    reader, region_id = Catalog(tools.store), names.last(region.name)
    run = reader.run(names.parent(region.name))
    [arrays] = reader.region_failures(run.name, [region.name])
    # Who annotates waits for the answer itself: there is nobody to tell of the progress.
    assessor = Assessor(tools, run, arrays, Job(region.name, lambda _: None))
    parts = split(
        assessor.failures,
        arrays["held_out"],
        arrays["margin"],
        assessor.config(),
        bootstraps=run.config.mixture.bootstraps,
    )
    if parts is None:
        raise NotReady(
            f"nothing tells parts of region {region_id!r}: neither where its {region.size} failures lie nor how sure "
            "the classifier is of them; call it invalid or unsure",
            reason="NOT_SEPARABLE",
        )
    found = assessor.findings(parts.grouping.groups, parts.stability, shard_count=shard_count(tools.store, run))
    if not found:
        raise NotReady(
            f"region {region_id!r} has {len(parts.grouping.groups)} parts, but none is misread more often than the "
            "real images around it; call it invalid or unsure",
            reason="NO_PART_WORSE",
        )
    total = tools.store.read_message(keys.distillation(run.name), region_pb2.Distillation).counts.failures
    return region_pb2.Distillation(
        run=run.name,
        regions=assessor.stored(found, prefix=f"{region_id}-", total=total),
        counts=counts(parts.grouping, found),
    )
