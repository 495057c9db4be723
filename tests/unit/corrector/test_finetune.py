from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from services.corrector.finetune import Labelled, Schedule, finetune, mixed_loss

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
SCHEDULE = Schedule(epochs=2, learning_rate=0.01, region_weight=0.3, seed=4, batch_size=32)
ROWS = 150


@dataclass
class Recorded:
    """A data set that remembers which rows were fetched."""

    inputs: Array
    labels: Array
    fetched: list[Array] = field(default_factory=list)

    def fetch(self, rows: Array) -> Array:
        self.fetched.append(rows)
        return np.asarray(self.inputs[rows])

    def labelled(self) -> Labelled:
        return Labelled(fetch=self.fetch, labels=self.labels)


class Watched(nn.Module):
    """A network that remembers the batch size of every forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        out: torch.Tensor = self.inner(x)
        return out


def network(*layers: nn.Module, hidden: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2), *layers)


def original(seed: int = 0) -> Recorded:
    """Plant two classes, divided by the sign of x0, at x1 < 1."""
    x = np.random.default_rng(seed).uniform([-1, -1], [1, 1], (ROWS, 2)).astype(np.float32)
    return Recorded(x, (x[:, 0] > 0).astype(np.int64))


def region(seed: int = 0) -> Recorded:
    """Plant a region at x1 in 3 to 4 where class 1 lies at x0 < 0, against the rule."""
    x = np.random.default_rng([seed, 1]).uniform([-1, 3], [0, 4], (60, 2)).astype(np.float32)
    return Recorded(x, np.ones(60, np.int64))


def train(
    schedule: Schedule = SCHEDULE,
    *,
    module: nn.Module | None = None,
    data: Recorded | None = None,
    added: Recorded | None = None,
    on_step: Callable[[int, int, float], None] = lambda *_: None,
) -> nn.Module:
    return finetune(
        module or network(),
        (data or original()).labelled(),
        (added or region()).labelled(),
        schedule,
        device=CPU,
        on_step=on_step,
    )


def weights(module: nn.Module) -> list[Array]:
    return [parameter.detach().numpy() for parameter in module.parameters()]


def accuracy(module: nn.Module, data: Recorded) -> float:
    with torch.no_grad():
        return float((module(torch.from_numpy(data.inputs)).argmax(1).numpy() == data.labels).mean())


def test_mixed_loss() -> None:
    """The loss is (1 - lambda) CE(original) + lambda CE(regions)."""
    assert float(mixed_loss(torch.tensor(2.0), torch.tensor(10.0), 0.25)) == pytest.approx(4.0)


def test_the_loss_reported_is_the_mixed_loss() -> None:
    """The first step's loss is the formula over the two batches that were fetched."""
    data, added, losses = original(), region(), []
    train(data=data, added=added, on_step=lambda step, steps, loss: losses.append(loss))
    logits = [network()(torch.from_numpy(part.inputs[part.fetched[0]])) for part in (data, added)]
    labels = [torch.from_numpy(part.labels[part.fetched[0]]) for part in (data, added)]
    first, second = (F.cross_entropy(a, b) for a, b in zip(logits, labels, strict=True))
    assert losses[0] == pytest.approx(0.7 * first.item() + 0.3 * second.item(), rel=1e-5)


def test_lambda_0_is_plain_training() -> None:
    """With lambda 0 the weights are those of Adam with a cosine on the original data alone."""
    data = original()
    trained = train(replace(SCHEDULE, region_weight=0.0), data=data)
    plain = network()
    adam = torch.optim.Adam(plain.parameters(), lr=SCHEDULE.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=len(data.fetched))
    for rows in data.fetched:
        adam.zero_grad()
        F.cross_entropy(plain(torch.from_numpy(data.inputs[rows])), torch.from_numpy(data.labels[rows])).backward()
        adam.step()
        cosine.step()
    for one, other in zip(weights(trained), weights(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_same_seed_same_weights() -> None:
    """Training is its data and its seed."""
    first, second, other = (weights(train(replace(SCHEDULE, seed=seed))) for seed in (1, 1, 2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first[0] != other[0]).any()


def test_every_batch_is_full_and_every_row_is_seen_each_epoch() -> None:
    """Batches have the full size, the last of an epoch filled with its own rows; epochs differ in order."""
    data, added = original(), region()
    train(data=data, added=added)
    assert {len(rows) for rows in data.fetched + added.fetched} == {32}
    assert len(data.fetched) == len(added.fetched) == 10
    epochs = np.concatenate(data.fetched[:5]), np.concatenate(data.fetched[5:])
    for rows in epochs:
        assert set(rows) == set(range(ROWS))
        assert np.bincount(rows).max() == 2
    assert (epochs[0] != epochs[1]).any()


def test_data_smaller_than_a_batch() -> None:
    """A batch is filled from a data set that is smaller than it, as often as it takes."""
    data = original()
    few = Recorded(data.inputs[:5], data.labels[:5])
    train(data=few)
    assert [len(rows) for rows in few.fetched] == [32, 32]
    assert set(few.fetched[0]) == set(range(5))


@pytest.mark.parametrize(("fixed", "batch"), [(8, 32), (12, 36), (50, 50)])
def test_fixed_batch_size_is_respected(fixed: int, batch: int) -> None:
    """A graph with a batch size of its own sees exactly that many images a pass; the step takes a multiple of it."""
    watched, data = Watched(network()), original()
    train(replace(SCHEDULE, fixed_batch_size=fixed), module=watched, data=data)
    assert set(watched.sizes) == {fixed}
    assert {len(rows) for rows in data.fetched} == {batch}


def test_fixed_batch_size_changes_no_weights() -> None:
    """Passing a batch in parts is passing the batch."""
    whole, parts = train(), train(replace(SCHEDULE, fixed_batch_size=8))
    for one, other in zip(weights(whole), weights(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_probabilities_are_trained_by_their_logarithm() -> None:
    """A graph that answers probabilities learns what the same graph learns from logits."""
    logits = train()
    probabilities = train(replace(SCHEDULE, probabilities=True), module=network(nn.Softmax(dim=1)))
    for one, other in zip(weights(logits), weights(probabilities), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_learns_a_planted_region_and_keeps_the_rest() -> None:
    """A deployed network that is wrong all over a region is right there afterwards, also on images it never saw."""
    deployed = train(Schedule(epochs=60, learning_rate=0.02, region_weight=0.0, seed=0))
    assert accuracy(deployed, region(seed=7)) < 0.3
    assert accuracy(deployed, original(seed=7)) > 0.95
    corrected = train(Schedule(epochs=60, learning_rate=0.02, region_weight=0.3, seed=0), module=deployed)
    assert accuracy(corrected, region(seed=7)) > 0.97
    assert accuracy(corrected, original(seed=7)) > 0.95


def test_the_network_comes_back_ready_to_answer() -> None:
    """The very network that was given comes back, in evaluation mode; what does not require a gradient is as it was."""
    module = network()
    frozen = next(module.parameters())
    frozen.requires_grad_(requires_grad=False)
    before = frozen.clone()
    assert train(module=module) is module
    assert not module.training
    assert torch.equal(frozen, before)


def test_steps_are_reported_and_can_stop_the_training() -> None:
    """Every step says its number and the total; what `on_step` raises ends the training there."""
    steps = []

    def stop(step: int, total: int, _: float) -> None:
        steps.append((step, total))
        if step == 3:
            raise KeyboardInterrupt

    data = original()
    with pytest.raises(KeyboardInterrupt):
        train(data=data, on_step=stop)
    assert steps == [(1, 10), (2, 10), (3, 10)]
    assert len(data.fetched) == 3
