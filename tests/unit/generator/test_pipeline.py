import contextvars
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.arrays import as_floats, as_stored
from services.generator.pipeline import DecoderPool, classified, rounded

Array = npt.NDArray[np.float32]
# Within which a test that hangs fails.
TIMEOUT_S = 60


@dataclass
class Batch:
    """Latents with a name to find beside the answer."""

    z: Array
    name: str


@dataclass
class Answer:
    logits: Array
    models: "Models"

    def result(self) -> Array:
        with self.models.lock:
            self.models.asked += 1
        return self.logits


class Models:
    """A decoder that multiplies by ten and a classifier that adds one; counts what is sent and not yet looked at."""

    def __init__(self, before: Callable[[Array], object] = lambda _: None) -> None:
        self.sent = self.asked = self.most_open = 0
        self.lock = threading.Lock()
        self._before = before

    def render(self, batch: Batch) -> Array:
        self._before(batch.z)
        return 10 * batch.z

    def submit(self, images: Array) -> Answer:
        with self.lock:
            self.sent += 1
            self.most_open = max(self.most_open, self.sent - self.asked)
        return Answer(images + 1, self)

    def answers(self, batches: list[Batch], decoders: DecoderPool) -> Iterator[tuple[Batch, Array]]:
        return classified(batches, self.render, self.submit, decoders)


@pytest.fixture(params=[1, 2, 5])
def decoders(request: pytest.FixtureRequest) -> Iterator[DecoderPool]:
    threads = DecoderPool(request.param)
    yield threads
    threads.pool.shutdown()


def batches(*sizes: int) -> list[Batch]:
    return [Batch(np.full((size, 2), number, np.float32), str(number)) for number, size in enumerate(sizes)]


def test_answers_come_with_their_batches_in_order(decoders: DecoderPool) -> None:
    """Each batch comes back with the logits of its own decoded latents."""
    models = Models()
    answers = list(models.answers(batches(2, 4, 1, 3, 4, 2, 2, 2), decoders))
    assert [batch.name for batch, _ in answers] == [str(number) for number in range(8)]
    for batch, logits in answers:
        np.testing.assert_array_equal(logits, 10 * batch.z + 1)
    assert models.sent == models.asked == 8


def test_what_is_made_comes_in_order(decoders: DecoderPool) -> None:
    """Makers are called in the decoders' threads, and what they make comes in their order."""
    threads = list(decoders.prefetch([threading.get_ident] * 20))
    assert threading.get_ident() not in threads
    assert list(decoders.prefetch([partial(int, number) for number in range(20)])) == list(range(20))


def test_decoding_runs_ahead_a_little(decoders: DecoderPool) -> None:
    """Batches are begun before the first answer is looked at, but never many more than there are decoders."""
    taken = 0

    def counted() -> Iterator[Batch]:
        nonlocal taken
        for batch in batches(*[1] * 100):
            taken += 1
            yield batch

    models = Models()
    ahead = [taken - number for number, _ in enumerate(classified(counted(), models.render, models.submit, decoders))]
    assert taken == models.sent == 100
    assert decoders.count < ahead[0] == max(ahead) <= 4 * decoders.count


def test_batches_are_decoded_side_by_side() -> None:
    """With two decoders two batches are decoded at the same time, each in a thread of its own."""
    both, threads = threading.Barrier(2, timeout=TIMEOUT_S), set()

    def meet(_: Array) -> None:
        both.wait()
        threads.add(threading.get_ident())

    decoders = DecoderPool(2)
    assert len(list(Models(meet).answers(batches(1, 1, 1, 1), decoders))) == 4
    assert len(threads) == 2
    decoders.pool.shutdown()


def test_decoders_begin_with_what_they_are_told() -> None:
    """Each decoder thread starts with its own preparation, once."""
    started: list[int] = []
    decoders = DecoderPool(1, at_start=lambda: started.append(threading.get_ident()))
    list(Models().answers(batches(1, 1, 1), decoders))
    assert len(started) == 1
    assert started[0] != threading.get_ident()
    decoders.pool.shutdown()


def test_whoever_stops_early_leaves_nothing_waiting() -> None:
    """Batches that were not begun when the caller stops are never decoded."""
    decoded: list[float] = []
    gate = threading.Event()

    def hold(z: Array) -> None:
        decoded.append(float(z[0, 0]))
        if z[0, 0] > 0:
            gate.wait(TIMEOUT_S)

    decoders = DecoderPool(1)
    answers = Models(hold).answers(batches(*[1] * 10), decoders)
    next(answers)
    answers.close()  # type: ignore[attr-defined]  # it is a generator
    gate.set()
    decoders.pool.shutdown()
    assert decoded in ([0], [0, 1])


def test_a_decoder_that_fails_is_heard() -> None:
    """An exception in a decoder thread is raised to the reader of the answers."""

    def fail(_: Array) -> None:
        raise ZeroDivisionError

    decoders = DecoderPool(2)
    with pytest.raises(ZeroDivisionError):
        list(Models(fail).answers(batches(1, 1), decoders))
    decoders.pool.shutdown()


def test_nothing_to_classify(decoders: DecoderPool) -> None:
    """Without batches there are no answers."""
    models = Models()
    assert not list(models.answers([], decoders))
    assert models.sent == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_rounded_images_are_as_if_stored(seed: int) -> None:
    """Rounding gives what comes back from eight bits, and once more nothing else; a tensor stays one."""
    images = np.random.default_rng(seed).random((3, 1, 8, 8), np.float32)
    once = rounded(images)
    np.testing.assert_array_equal(once, as_floats(as_stored(images)))
    np.testing.assert_array_equal(rounded(once), once)
    assert 0 < np.abs(once - images).max() <= 0.5 / 255 + 1e-7
    tensor = rounded(torch.from_numpy(images))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), once, rtol=1e-6)


def test_what_is_made_knows_the_context_of_its_caller() -> None:
    """A trace is told by a context variable, which threads do not hand on by themselves."""
    trace, decoders = contextvars.ContextVar[str]("trace"), DecoderPool(2)
    trace.set("of the run")
    assert list(decoders.prefetch([trace.get, trace.get, trace.get])) == 3 * ["of the run"]
    decoders.pool.shutdown()
