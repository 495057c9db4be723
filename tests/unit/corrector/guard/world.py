"""The world of corrections with what a search left in it: an encoder, the training images' latents, held-out images."""

import numpy as np
from defuse.v1 import annotation_pb2, region_pb2

from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.unit.corrector.corrections import DATASET, DIM, REGIONS, ROWS, RUN, build
from tests.unit.generator.onnx_pairs import encoder_file


def searched(store: ArtifactStore) -> None:
    """Fill a store: latents are the pixels themselves, every second validation image is held out."""
    build(store)
    run = Catalog(store).run(RUN)
    run.config.model_version = 1
    store.write_message(keys.run(RUN), run)
    train = store.read_arrays(keys.split(DATASET, "train"))
    latent = train["x"].reshape(-1, DIM).astype(np.float32) / 255
    store.write_bytes(keys.vae(run.config, "encoder.onnx"), encoder_file())
    reference = {
        "latent": latent,
        "label": train["y"],
        "log_density": np.linspace(-20, 0, len(latent)),
        "log_share": np.zeros(1),
        "mean": latent.mean(axis=0)[None],
        "whitening": np.eye(DIM)[None],
        "sd_agg": np.ones(DIM, np.float32),
    }
    store.write_arrays(keys.reference(run.config), reference)
    held_out = (np.arange(ROWS["val"]) % 2).astype(np.uint8)
    store.write_arrays(keys.sources(RUN), {"index": np.arange(ROWS["val"]), "held_out": held_out})
    store.write_message(
        keys.distillation(RUN), region_pb2.Distillation(regions=[region_pb2.Region(name=name) for name in REGIONS])
    )


def annotate(store: ArtifactStore, region: str, label: str, verdict: str = "VERDICT_LABEL") -> None:
    annotation = annotation_pb2.Annotation(region=region, verdict=verdict, label=label)
    store.write_message(f"{keys.annotations(region)}/1.pb", annotation)
