"""The preflight: accuracy on real images and on their reconstructions."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from scipy.stats import beta

from services.arrays import Array, as_floats
from services.generator import pipeline
from services.generator.search import MARGIN_EPSILON, SearchModels, margins

CONFIDENCE = 0.95


class PreflightRefused(Exception):
    """Raised when the run is refused; `reason` names the cause."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class SourceMargins:
    """Margins of n sources, on image and reconstruction.

    A margin is the logit of the label minus the largest other one. With the rendering `residual`, the unperturbed image
    takes the reconstruction's place.
    """

    # (n,) on the real image
    image_margin: Array
    # (n,) on its unperturbed reconstruction
    reconstruction_margin: Array
    # (n,) class with the largest logit beside the label, on the reconstruction
    runner_up: Array

    @property
    def right_on_image(self) -> Array:
        """Return whether each image is classified correctly, by more than rounding."""
        return np.asarray(self.image_margin > MARGIN_EPSILON)

    @property
    def searchable(self) -> Array:
        """Return whether image and reconstruction are both classified correctly.

        The margins must be larger than rounding.
        """
        return np.asarray(self.right_on_image & (self.reconstruction_margin > MARGIN_EPSILON))

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class _ImageBatch:
    z: Array
    image: pipeline.Pending
    label: Array


def measure_margins(
    images: Array, labels: Array, mu: Array, models: SearchModels, *, batch_size: int, check: Callable[[], None]
) -> SourceMargins:
    """Classify stored images (n, h, w, c) uint8 and, unless the rendering is `residual`, their reconstructions.

    `mu` (n, d) has the posterior means of the images. `check` is called before every batch and may raise to stop.
    """

    def batch_of(part: slice) -> _ImageBatch:
        return _ImageBatch(z=mu[part], image=models.submit(as_floats(images[part])), label=labels[part])

    def makers() -> Iterator[Callable[[], _ImageBatch]]:
        for begin in range(0, len(labels), batch_size):
            check()
            yield partial(batch_of, slice(begin, begin + batch_size))

    batches = models.decoders.prefetch(makers())
    answers: Iterable[tuple[_ImageBatch, Array]] = (
        ((batch, batch.image.result()) for batch in batches)
        if models.residual
        else pipeline.classified(batches, lambda batch: models.decode(batch.z), models.submit, models.decoders)
    )
    parts = [_measure_batch(batch, logits) for batch, logits in answers]
    nothing = {"image_margin": np.zeros(0), "reconstruction_margin": np.zeros(0), "runner_up": np.zeros(0, np.int64)}
    return SourceMargins(**{name: np.concatenate([part[name] for part in [*parts, nothing]]) for name in nothing})


def check_accuracy(right: int, images: int, *, declared: float) -> None:
    """Raise PreflightRefused when labelled images contradict the declared accuracy.

    The contradiction must hold at 95 % confidence.
    """
    highest = 1.0 if right == images else float(beta.ppf(CONFIDENCE, right + 1, images - right))
    if highest < declared:
        raise PreflightRefused(
            "PREPROCESSING_MISMATCH",
            f"the served classifier reads {right} of {images} labelled images correctly ({right / images:.3f}), where "
            f"{declared:g} is declared; compare the model's preprocessing (range, mean, std, layout) and its order of "
            "classes with those of its training, or declare the accuracy that it has (preflight.declared_accuracy)",
        )


def check_reconstructions(right: int, images: int, *, allowed_loss: float) -> None:
    """Raise PreflightRefused when too many reconstructions are misclassified.

    The excess must hold at 95 % confidence.
    """
    lost = images - right
    lowest = 0.0 if lost == 0 else float(beta.ppf(1 - CONFIDENCE, lost, images - lost + 1))
    if lowest > allowed_loss:
        raise PreflightRefused(
            "VAE_TOO_COARSE",
            f"of {images} images that the classifier reads correctly it misreads {lost} ({lost / images:.3f}) as "
            f"unperturbed reconstructions, where {allowed_loss:g} is allowed: their failures would be the VAE's; train "
            "it longer or with more dimensions (vae.epochs, vae.latent_dim), bring an encoder and a decoder of your "
            "own, choose search.rendering `residual`, or allow the loss (preflight.max_reconstruction_loss)",
        )


def _measure_batch(batch: _ImageBatch, logits: Array) -> dict[str, Array]:
    others = logits.copy()
    others[np.arange(len(logits)), batch.label] = -np.inf
    return {
        "image_margin": margins(batch.image.result(), batch.label),
        "reconstruction_margin": margins(logits, batch.label),
        "runner_up": others.argmax(axis=1),
    }
