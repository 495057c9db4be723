"""Reads the regions of two runs from the store and compares them in one latent space."""

from collections.abc import Callable, Iterator

import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import region_pb2, run_pb2

from services.arrays import Array
from services.distiller.comparison import Place, pairs
from services.latent_space.autoencoder import read_decoder, read_encoder
from services.onnx_graph.export import in_batches
from services.statistics.gaussian import Gaussian
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

# Failures of a region that are carried to another latent space, and how many at once.
_MOST_CARRIED, _BATCH = 2_000, 256


def compare(store: ArtifactStore, before: str, after: str) -> region_pb2.RegionsDiff:
    """Say which regions of the second of two distilled runs are new, gone or moved.

    Where the runs have VAEs of their own, the second one's failures are decoded and encoded again, into the latent
    space of the first. Raises InvalidInput where their images differ in shape or their models in classes.
    """
    first, second = (_regions(store, name) for name in (before, after))
    runs = [Catalog(store).run(name) for name in (before, after)]
    _check_comparable(store, *runs)
    here = [_gaussian(store, region) for region in first]
    there = list(_carried(store, second, here, *runs))
    found = pairs(_places(store, first, here), _places(store, second, there))
    known, kept = {pair.before for pair in found}, {pair.after for pair in found}
    return region_pb2.RegionsDiff(
        added=[region for number, region in enumerate(second) if number not in kept],
        gone=[region for number, region in enumerate(first) if number not in known],
        kept=[
            region_pb2.RegionPair(
                before=first[pair.before], after=second[pair.after], shift_sd=pair.shift_sd, moved=pair.moved
            )
            for pair in found
        ],
    )


def _regions(store: ArtifactStore, run: str) -> list[region_pb2.Region]:
    return list(store.read_message(keys.distillation(run), region_pb2.Distillation).regions)


def _gaussian(store: ArtifactStore, region: region_pb2.Region) -> Gaussian:
    arrays = store.map_arrays(keys.region_arrays(region.name))
    return Gaussian(mean=np.array(arrays["mean"]), covariance=np.array(arrays["covariance"]))


def _places(store: ArtifactStore, regions: list[region_pb2.Region], gaussians: list[Gaussian]) -> list[Place]:
    return [
        Place(
            confusion=(region.true_label, region.predicted_label),
            gaussian=gaussian,
            sources=len(np.unique(store.map_arrays(keys.region_arrays(region.name))["source"])),
        )
        for region, gaussian in zip(regions, gaussians, strict=True)
    ]


def _carried(
    store: ArtifactStore,
    regions: list[region_pb2.Region],
    here: list[Gaussian],
    before: run_pb2.Run,
    after: run_pb2.Run,
) -> Iterator[Gaussian]:
    """Yield the Gaussians of regions of the second run in the latent space of the first."""
    shared = keys.vae(before.config, "") == keys.vae(after.config, "")
    if shared or not here:  # in one space, or nothing to compare with
        yield from (_gaussian(store, region) for region in regions)
        return
    carry = _carry(store, before, after)
    believed = np.mean([gaussian.covariance for gaussian in here], axis=0)
    for region in regions:
        latent = store.map_arrays(keys.region_arrays(region.name))["latent"]
        few = np.linspace(0, len(latent) - 1, min(len(latent), _MOST_CARRIED)).astype(int)
        yield Gaussian.of(carry(np.asarray(latent[few])), believed)


def _carry(store: ArtifactStore, before: run_pb2.Run, after: run_pb2.Run) -> Callable[[Array], Array]:
    decode, encode = read_decoder(store, after.config), read_encoder(store, before.config)
    return lambda latent: in_batches(lambda part: encode(decode(part)), latent, _BATCH)


def _check_comparable(store: ArtifactStore, before: run_pb2.Run, after: run_pb2.Run) -> None:
    first, second = (Catalog(store).model(run.config.model) for run in (before, after))
    for what, one, other in (
        ("images", list(first.image_shape), list(second.image_shape)),
        ("classes", list(first.classes), list(second.classes)),
    ):
        if one != other:
            raise InvalidInput(
                f"{what} of run {names.last(before.name)!r} are {one[:10]}, those of {names.last(after.name)!r} "
                f"{other[:10]}; compare runs of one kind of classifier",
                reason="NOT_COMPARABLE",
            )
