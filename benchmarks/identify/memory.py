"""`python -m benchmarks.identify.memory N`: peak anonymous memory of preparing and searching N source images."""

import argparse
import json
import os
import threading
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.stand import Array, Data, Stand, read, standing
from services.demo.classifier import digits
from services.generator import noise
from services.localstack.stack import StackSettings

_SAMPLE_S = 0.02
_TRAINED = 2_000


def main() -> None:
    """Search around shifted copies of real images; print the peak as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identify.memory", description=__doc__)
    parser.add_argument("sources", type=int)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    path = arguments.data or digits(StackSettings().cache.expanduser() / "demo")
    with standing("cpu", threads=os.cpu_count() or 1) as stand:
        print(json.dumps(searched(stand, read(path), arguments.sources)))


def searched(stand: Stand, data: Data, sources: int, trained: int = _TRAINED) -> dict[str, float]:
    """Search around so many images; return how many there were and the peak of this process."""
    # By seed: images that lie sorted by label would leave classes out.
    rows = {
        name: noise.choose_positions(seed=1, count=len(data.labels[name]), limit=trained) for name in ("train", "test")
    }
    images = {name: data.images[name][chosen] for name, chosen in rows.items()}
    labels = {name: data.labels[name][chosen] for name, chosen in rows.items()}
    few = Data(name=data.name, images=images | {"val": images["test"]}, labels=labels | {"val": labels["test"]})
    model = stand.register("copies", few, few.labels["train"], seed=0, epochs=1)
    dataset = stand.add_dataset("copies", _copies(few, data, sources))
    del data, images, few
    relaxed = {"declared_accuracy": 0.0, "max_reconstruction_loss": 1.0}
    config = stand.configure(
        model, dataset, search={"draws_per_source": 2, "rounds": 2}, vae={"epochs": 1}, preflight=relaxed
    )
    with _Peak() as peak:
        search = stand.prepare("memory", config).until(10**9)
    return {"sources": search.counts.sources, "peak_rss_anon_mib": round(peak.mib, 1)}


def _copies(few: Data, data: Data, count: int) -> Data:
    """Return the small data with so many source images: real ones again and again, each shifted by up to two pixels."""
    originals, labels = data.images["train"], data.labels["train"]
    shifts = np.random.default_rng(0).integers(-2, 3, (count, 2))
    images: Array = np.empty((count, *originals.shape[1:]), np.uint8)
    for row in range(count):
        images[row] = np.roll(originals[row % len(originals)], tuple(shifts[row]), axis=(0, 1))
    return Data(
        name=data.name,
        images=few.images | {"val": images},
        labels=few.labels | {"val": labels[np.arange(count) % len(labels)]},
    )


class _Peak:
    """Watches the anonymous memory of this process from a thread."""

    mib = 0.0

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.mib = max(self.mib, int(line.split()[1]) / 1024)


if __name__ == "__main__":
    main()
