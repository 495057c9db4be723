"""Reads the regions of two runs from the store and compares them in one latent space."""

from collections.abc import Callable, Iterator

import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import region_pb2, run_pb2

from services.distiller.comparison import Place, pairs
from services.distiller.gaussian import Array, Gaussian
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.autoencoder import read_decoder, read_encoder
from services.runtime.catalog import Catalog


def compare(store: ArtifactStore, before: str, after: str) -> region_pb2.RegionsDiff:
    """Say which regions of the second of two distilled runs are new, gone or moved.

    Where the runs have VAEs of their own, the second one's failures are decoded and encoded again, into the latent
    space of the first. Raises InvalidInput where their images differ in shape.
    """
    first, second = (_regions(store, name) for name in (before, after))
    runs = [Catalog(store).run(name) for name in (before, after)]
    here = [_gaussian(store, region) for region in first]
    there = list(_carried(store, second, here, *runs))
    found = pairs(_places(first, here), _places(second, there))
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
    return list(store.read_message(catalog.distillation(run), region_pb2.Distillation).regions)


def _gaussian(store: ArtifactStore, region: region_pb2.Region) -> Gaussian:
    arrays = store.map_arrays(catalog.region_arrays(region.name))
    return Gaussian(mean=np.array(arrays["mean"]), covariance=np.array(arrays["covariance"]))


def _places(regions: list[region_pb2.Region], gaussians: list[Gaussian]) -> list[Place]:
    return [
        Place(confusion=(region.true_label, region.predicted_label), gaussian=gaussian)
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
    if catalog.vae(before.config, "") == catalog.vae(after.config, ""):
        yield from (_gaussian(store, region) for region in regions)
    elif regions and here:
        carry = _carry(store, before, after)
        believed = np.mean([gaussian.covariance for gaussian in here], axis=0)
        for region in regions:
            latent = store.read_arrays(catalog.region_arrays(region.name))["latent"]
            yield Gaussian.of(carry(latent), believed)
    else:  # nothing to compare with
        yield from (_gaussian(store, region) for region in regions)


def _carry(store: ArtifactStore, before: run_pb2.Run, after: run_pb2.Run) -> Callable[[Array], Array]:
    shapes = [list(Catalog(store).model(run.config.model).image_shape) for run in (before, after)]
    if shapes[0] != shapes[1]:
        raise InvalidInput(
            f"images of run {names.last(before.name)!r} are {shapes[0]}, those of {names.last(after.name)!r} "
            f"{shapes[1]} (h, w, c); compare runs on images of one shape",
            reason="DIFFERENT_SHAPES",
        )
    decode, encode = read_decoder(store, after.config), read_encoder(store, before.config)
    return lambda latent: encode(np.clip(decode(latent), 0, 1))
