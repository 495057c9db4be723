from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from services.corrector.finetune import FinetuneJob, FinetuneOutcome, InputMap, LabelledDataset, TrainingMix, finetune
from services.corrector.training_state import JUDGEMENTS, PATIENCE, Schedule

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

    def labelled(self) -> LabelledDataset:
        return LabelledDataset(fetch=self.fetch, labels=self.labels)


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


NOTHING = LabelledDataset(fetch=lambda rows: rows, labels=np.zeros(0, np.int64))


def finetune_job(
    schedule: Schedule = SCHEDULE,
    *,
    module: nn.Module | None = None,
    data: Recorded | None = None,
    added: Recorded | None = None,
    held_out: tuple[Recorded, Recorded] | None = None,
    augment: Callable[[Array, Array], Array] = lambda images, _: images,
) -> FinetuneJob:
    judging = TrainingMix(original=NOTHING, regions=NOTHING)
    if held_out:
        judging = TrainingMix(original=held_out[0].labelled(), regions=held_out[1].labelled())
    return FinetuneJob(
        network=module or network(),
        data=TrainingMix(original=(data or original()).labelled(), regions=(added or region()).labelled()),
        held_out=judging,
        inputs=InputMap(prepare=lambda images: images, augment=augment),
        schedule=schedule,
    )


def train(schedule: Schedule = SCHEDULE, **parts: Any) -> nn.Module:
    """Train without anything held out; return the network."""
    ready = finetune_job(schedule, **parts)
    finetune(ready, device=CPU)
    return ready.network


def weights(module: nn.Module) -> list[Array]:
    return [parameter.detach().numpy() for parameter in module.parameters()]


def accuracy(module: nn.Module, data: Recorded) -> float:
    with torch.no_grad():
        return float((module(torch.from_numpy(data.inputs)).argmax(1).numpy() == data.labels).mean())


def test_the_loss_reported_is_the_mixed_loss() -> None:
    """The first step's loss is the formula over the two batches that were fetched."""
    data, added, losses = original(), region(), []
    finetune(finetune_job(data=data, added=added), device=CPU, on_step=lambda step, steps, loss: losses.append(loss))
    logits = [network()(torch.from_numpy(part.inputs[part.fetched[0]])) for part in (data, added)]
    labels = [torch.from_numpy(part.labels[part.fetched[0]]) for part in (data, added)]
    first, second = (F.cross_entropy(a, b) for a, b in zip(logits, labels, strict=True))
    assert losses[0] == pytest.approx(0.7 * first.item() + 0.3 * second.item(), rel=1e-5)


def test_lambda_0_is_plain_training() -> None:
    """With lambda 0 the weights are those of Adam on the original data alone."""
    data = original()
    trained = train(replace(SCHEDULE, region_weight=0.0), data=data)
    plain = network()
    adam = torch.optim.Adam(plain.parameters(), lr=SCHEDULE.learning_rate)
    for step, rows in enumerate(data.fetched):
        adam.param_groups[0]["lr"] = SCHEDULE.rate_at((step + 0.5) / len(data.fetched))
        adam.zero_grad()
        F.cross_entropy(plain(torch.from_numpy(data.inputs[rows])), torch.from_numpy(data.labels[rows])).backward()
        adam.step()
    for one, other in zip(weights(trained), weights(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_rate_rises_and_falls() -> None:
    """It begins near nothing, is at its peak after a twentieth of the steps, half of it halfway down, and ends at 0."""
    rates = [SCHEDULE.rate_at(progress) for progress in (0.005, 0.05, 0.525, 1.0)]
    np.testing.assert_allclose(rates, np.array([0.1, 1, 0.5, 0]) * SCHEDULE.learning_rate, atol=1e-12)


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
    watched, data, held_out = Watched(network()), original(), (original(1), region(1))
    train(replace(SCHEDULE, fixed_batch_size=fixed), module=watched, data=data, held_out=held_out)
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
    """The given network ends in evaluation mode; parameters without a gradient are unchanged."""
    module = network()
    frozen = next(module.parameters())
    frozen.requires_grad_(requires_grad=False)
    before = frozen.clone()
    train(module=module)
    assert not module.training
    assert torch.equal(frozen, before)


def test_steps_are_reported_and_can_stop_the_training() -> None:
    """Every step reports its number and the total; an exception of `on_step` ends the training there."""
    steps = []

    def stop(step: int, total: int, _: float) -> None:
        steps.append((step, total))
        if step == 3:
            raise KeyboardInterrupt

    data = original()
    with pytest.raises(KeyboardInterrupt):
        finetune(finetune_job(data=data), device=CPU, on_step=stop)
    assert steps == [(1, 10), (2, 10), (3, 10)]
    assert len(data.fetched) == 3


class Judged(nn.Module):
    """A network of one weight, whose loss on the held-out data says what the weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] * torch.stack([self.weight, -self.weight], dim=1).reshape(1, 2)


def pulling(sign: float, rows: int = 32) -> Recorded:
    """Plant a data set whose loss falls as the weight goes up, for a sign of 1, or down."""
    return Recorded(np.full((rows, 2), sign, np.float32), np.zeros(rows, np.int64))


def test_the_weights_with_the_lowest_held_out_loss_are_kept() -> None:
    """Where training leads away from the held-out data it stops, with the weights of its first judgement."""
    schedule = replace(SCHEDULE, epochs=40, batch_size=8)
    against = finetune_job(
        schedule, module=Judged(), data=pulling(1), added=pulling(1), held_out=(pulling(-1), pulling(-1))
    )
    steps = 40 * 4
    outcome = finetune(against, device=CPU)
    every = steps // JUDGEMENTS
    assert outcome == FinetuneOutcome(steps=every * (1 + PATIENCE), best_step=every)
    kept = float(next(against.network.parameters()).detach())
    whole = finetune_job(schedule, module=Judged(), data=pulling(1), added=pulling(1))
    assert finetune(whole, device=CPU) == FinetuneOutcome(steps=steps, best_step=steps)
    assert 0 < kept < float(next(whole.network.parameters()).detach())


def test_a_training_that_gets_better_goes_to_its_end() -> None:
    """Held-out data of the same kind stops nothing."""
    ready = finetune_job(module=Judged(), data=pulling(1), added=pulling(1), held_out=(pulling(1), pulling(1)))
    assert finetune(ready, device=CPU) == FinetuneOutcome(steps=2, best_step=2)


def test_both_parts_of_the_held_out_data_judge() -> None:
    """The held-out loss is mixed by lambda, too: gains in the regions can outweigh losses elsewhere."""
    for weight, best in ((0.9, 160), (0.1, 13)):
        schedule = replace(SCHEDULE, epochs=40, batch_size=8, region_weight=weight)
        ready = finetune_job(
            schedule, module=Judged(), data=pulling(1), added=pulling(1), held_out=(pulling(-1), pulling(1))
        )
        assert finetune(ready, device=CPU).best_step == best


@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_killed_training_goes_on_to_the_same_weights(killed_after: int) -> None:
    """From its last checkpoint it ends where it would have ended: weights, moments, draws and the best so far."""
    schedule = replace(SCHEDULE, epochs=12)
    held_out = (original(1), region(1))
    checkpoints: list[bytes] = []

    def keep(file: bytes) -> None:
        checkpoints.append(file)
        if len(checkpoints) == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(finetune_job(schedule, held_out=held_out), device=CPU, on_checkpoint=keep)
    resumed, whole = finetune_job(schedule, held_out=held_out), finetune_job(schedule, held_out=held_out)
    steps: list[int] = []
    outcome = finetune(resumed, device=CPU, checkpoint=checkpoints[-1], on_step=lambda step, *_: steps.append(step))
    assert outcome == finetune(whole, device=CPU)
    assert steps[0] == killed_after * (60 // JUDGEMENTS) + 1
    for one, other in zip(weights(resumed.network), weights(whole.network), strict=True):
        np.testing.assert_array_equal(one, other)


def test_augmentation_is_drawn_anew_at_every_step_and_for_training_alone() -> None:
    """Each image of each batch gets draws of its own, the same ones with the same seed; held-out images get none."""
    seen: list[Array] = []

    def augment(images: Array, draws: Array) -> Array:
        seen.append(draws)
        return images

    held_out = (original(1), region(1))
    train(augment=augment, held_out=held_out)
    assert {draws.shape for draws in seen} == {(32, 4)}
    assert len(seen) == 2 * 10
    assert len(np.unique(np.concatenate(seen).ravel())) == 20 * 32 * 4
    first = np.concatenate(seen)
    seen.clear()
    train(augment=augment, held_out=held_out)
    np.testing.assert_array_equal(np.concatenate(seen), first)
