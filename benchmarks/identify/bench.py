"""The fixtures and sizes that all sections of the benchmark share."""

from dataclasses import dataclass
from typing import Any

from defuse.v1 import model_pb2

from benchmarks.stand import Data, Search, Stand

# Failures of one source that count, and decodes a source of the uniform search.
CAP = 5
UNIFORM_DRAWS = 10


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything, by default and for `--smoke`."""

    images: int
    sources: int
    classifier_epochs: int
    repeats: int
    # Whole searches, of which the median is told.
    whole_repeats: int
    batches: int
    # Searches whose figures are pooled.
    seeds: int
    failures: int
    released_s: float
    vae: dict[str, Any]
    preflight: dict[str, Any]


FULL = Sizes(
    images=0,
    sources=10_000,
    classifier_epochs=3,
    repeats=5,
    whole_repeats=3,
    batches=24,
    seeds=5,
    failures=1000,
    released_s=120,
    vae={},
    preflight={},
)
SMOKE = Sizes(
    images=800,
    sources=100,
    classifier_epochs=1,
    repeats=1,
    whole_repeats=1,
    batches=2,
    seeds=1,
    failures=5,
    released_s=1,
    vae={"epochs": 2},
    preflight={"declared_accuracy": 0.0, "max_reconstruction_loss": 1.0},
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The fixtures of a section."""

    stand: Stand
    data: Data
    dataset: str
    model: model_pb2.Model
    sizes: Sizes

    def prepared(self, name: str, model: model_pb2.Model | None = None, **sections: Any) -> Search:
        search = {"max_sources": self.sizes.sources} | sections.pop("search", {})
        given = {"vae": self.sizes.vae, "preflight": self.sizes.preflight, "search": search} | sections
        config = self.stand.configure(model or self.model, self.dataset, **given)
        self.stand.train_vae(self.data, config)  # once; any section may be the first one
        return self.stand.prepare(name, config)
