"""A walk in latent space."""

from dataclasses import dataclass

from defuse.values.region import Images


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The frames between two images, and what the model under test answers for each."""

    # (frames, h, w, c)
    images: Images
    # (frames,) class ids
    predicted_labels: tuple[int, ...]
