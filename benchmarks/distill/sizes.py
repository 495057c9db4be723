"""How much of everything, by default and for `--smoke`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of points, components and repetitions."""

    shapes: tuple[tuple[int, int], ...]
    components: int
    repeats: int
    # Seconds that scikit-learn climbs on each shape.
    reference_s: float
    seeds: int
    gap_points: int
    gap_iterations: int
    scaling: tuple[int, ...]
    process_points: int
    process_repeats: int
    memory: int
    streamed: int
    mixtures: tuple[tuple[int, int, float], ...]  # components, dimensions, how far apart
    mixture_points: int


FULL = Sizes(
    shapes=((10_000, 15), (50_000, 15), (50_000, 64)),
    components=100,
    repeats=7,
    reference_s=60.0,
    seeds=3,
    gap_points=3000,
    gap_iterations=500,
    scaling=(10_000, 100_000, 1_000_000),
    process_points=200_000,
    process_repeats=7,
    memory=1_000_000,
    streamed=10_000_000,
    mixtures=((5, 4, 2.0), (12, 6, 2.0), (20, 6, 2.0), (30, 10, 2.0), (40, 8, 2.0), (60, 15, 1.5)),
    mixture_points=8000,
)
SMOKE = Sizes(
    shapes=((1500, 6), (1500, 40)),
    components=15,
    repeats=2,
    reference_s=0.5,
    seeds=1,
    gap_points=500,
    gap_iterations=20,
    scaling=(1000, 4000),
    process_points=2000,
    process_repeats=1,
    memory=20_000,
    streamed=40_000,
    mixtures=((4, 3, 3.0),),
    mixture_points=800,
)
