"""What a training starts with, read and drawn from the store: network, data, what judges it, how fast."""

from collections.abc import Sequence

import numpy as np
from defuse.errors import InvalidInput
from defuse.v1.correction_pb2 import Training

from services.corrector.augmentation import Augmentation
from services.corrector.curriculum import RegionData, region_latents
from services.corrector.finetune import Fitting, Inputs, Labelled, Mix
from services.corrector.materials import Materials
from services.corrector.measuring import images_of
from services.corrector.networks import Network, deployed
from services.corrector.training_state import Schedule
from services.storage.catalog import LabelledImages
from services.triton.preprocessing import as_floats, preprocess

# Region images that are kept; more of them are decoded again for every batch.
_FLOAT_BYTES, _KEPT_BYTES = 4, 1 << 30


def read_fitting(materials: Materials, wanted: Training, allowed_factories: Sequence[str]) -> tuple[Network, Fitting]:
    """Return the deployed network, and everything that a training of it needs."""
    network = deployed(materials, allowed_factories)
    if wanted.method == Training.METHOD_LAST_LAYER:
        _train_last_layer_only(network)
    fitting = Fitting(
        network=network,
        data=_data(materials, wanted),
        held_out=_held_out(materials),
        inputs=_inputs(materials),
        schedule=_schedule(materials, wanted),
    )
    return network, fitting


def _train_last_layer_only(network: Network) -> None:
    if not network.last_layer:
        raise InvalidInput(
            "the network has no last layer, a product of weights with features that leads straight to the output; "
            "leave out the method last_layer",
            reason="NO_LAST_LAYER",
        )
    for name, weight in network.named_parameters():
        weight.requires_grad_(name in network.last_layer)


def _data(materials: Materials, wanted: Training) -> Mix:
    """Return what is learned from: original data, and images of regions, or of single failures in their place."""
    config = materials.correction.config
    regions = materials.regions()
    total = config.images_per_region * len(regions)
    if wanted.method == Training.METHOD_UNCLUSTERED:
        regions = materials.single_failures(config.unclustered_failures or len(regions))
    if not wanted.region_weight:
        regions = []
    return Mix(original=_stored(materials.train), regions=_drawn(materials, regions, total))


def _drawn(materials: Materials, regions: Sequence[RegionData], total: int) -> Labelled:
    if not regions:
        return Labelled(fetch=lambda rows: rows, labels=np.zeros(0, np.int64))
    latent, labels = region_latents(
        regions,
        per_region=max(1, total // len(regions)),
        believed=materials.believed,
        min_label_probability=materials.run.config.validity.min_label_probability,
        seed=materials.correction.config.seed,
    )
    if len(latent) * np.prod(materials.model.image_shape) * _FLOAT_BYTES > _KEPT_BYTES:
        return Labelled(fetch=lambda rows: materials.decode(latent[rows]), labels=labels)
    images = materials.decode(latent)
    return Labelled(fetch=lambda rows: images[rows], labels=labels)


def _held_out(materials: Materials) -> Mix:
    images, labels = images_of(materials, materials.held_out_regions(deciding=True))
    regions = Labelled(fetch=lambda rows: images[rows], labels=labels)
    return Mix(original=_stored(materials.held_out_original()), regions=regions)


def _stored(data: LabelledImages) -> Labelled:
    return Labelled(fetch=lambda rows: as_floats(data.images[rows]), labels=data.labels)


def _inputs(materials: Materials) -> Inputs:
    declared = materials.correction.config.augmentation
    augmentation = Augmentation(
        max_shift=declared.max_shift,
        max_rotation_degrees=declared.max_rotation_degrees,
        horizontal_flip=declared.horizontal_flip,
    )
    return Inputs(prepare=lambda images: preprocess(images, materials.model), augment=augmentation)


def _schedule(materials: Materials, wanted: Training) -> Schedule:
    config, model = materials.correction.config, materials.model
    return Schedule(
        epochs=config.epochs,
        learning_rate=wanted.learning_rate,
        region_weight=wanted.region_weight,
        seed=config.seed,
        fixed_batch_size=model.fixed_batch_size,
        probabilities=model.output == model.OUTPUT_PROBABILITIES,
    )
