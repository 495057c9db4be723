"""The promises of every transport, on the real Triton: equal answers, and none lost when Triton is killed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from defuse.errors import Unavailable

from services.triton.client import InferenceClient
from services.triton.transport import CUDA_SHARED_MEMORY, SYSTEM_SHARED_MEMORY
from tests.conftest import eventually
from tests.restartable_triton import TOLERANCE, Served, images

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Growing, shrinking, more than a request takes (256), none.
SIZES = (1, 7, 200, 30, 600, 0, 2)


def test_every_transport_gives_the_same_logits(served: Served, shared: InferenceClient) -> None:
    """For any sizes of a batch and of the previous one, shared memory and gRPC give the same answers."""
    classifier = served.classifier(shared)
    for seed, count in enumerate(SIZES):
        batch = images(count, seed)
        logits, expected = classifier.classify(batch), served.over_grpc(batch)
        assert logits.shape == expected.shape == (count, 3)
        np.testing.assert_allclose(logits, expected, **TOLERANCE)


def test_tensors_of_torch(served: Served, shared: InferenceClient) -> None:
    """A torch tensor is classified as the array of the same numbers."""
    batch = images(5)
    np.testing.assert_allclose(
        served.classifier(shared).classify(torch.from_numpy(batch)), served.over_grpc(batch), rtol=1e-5, atol=1e-5
    )


def test_images_may_change_once_they_are_sent(served: Served, shared: InferenceClient) -> None:
    """Changes after `submit` returned, while the request is under way, do not affect the answer."""
    classifier, batch = served.classifier(shared), images(200)
    expected, pending = served.over_grpc(batch), []
    for _ in range(6):
        sent = batch.copy()
        pending.append(classifier.submit(sent))
        sent[...] = np.nan
    for answer in pending:
        np.testing.assert_allclose(answer.result(), expected, **TOLERANCE)


@pytest.mark.usefixtures("no_gpu")
def test_auto_shares_memory_with_a_triton_on_this_host(served: Served, own_files: Callable[[], list[str]]) -> None:
    """Left to itself the client takes system shared memory on a host without a GPU, and its regions are registered."""
    with closing(InferenceClient(served.address)) as client:
        served.classifier(client).classify(images(3))
        assert client.transport == SYSTEM_SHARED_MEMORY
        assert served.regions() == own_files()
        assert len(own_files()) == 1


def test_many_threads_share_few_slots(
    served: Served, shared: InferenceClient, own_files: Callable[[], list[str]]
) -> None:
    """Threads that each send more than there are slots before they look at an answer get their own answers, all."""
    classifier = served.classifier(shared)

    def ask(thread: int) -> None:
        batches = [images(1 + (thread * 31 + number * 7) % 60, seed=thread * 100 + number) for number in range(12)]
        pending = [classifier.submit(batch) for batch in batches]
        expected = np.split(served.over_grpc(np.concatenate(batches)), np.cumsum([len(b) for b in batches])[:-1])
        for answer, logits in zip(pending, expected, strict=True):
            np.testing.assert_allclose(answer.result(), logits, **TOLERANCE)

    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(ask, range(8), timeout=120):
            assert len(own_files()) <= 2


def test_a_client_goes_on_after_triton_was_started_again(
    served: Served, shared: InferenceClient, own_files: Callable[[], list[str]]
) -> None:
    """A Triton that came back knows no region: the first request hears so, registers anew and is answered."""
    classifier, batch = served.classifier(shared), images(50)
    expected = classifier.classify(batch)
    before = own_files()
    served.kill()
    served.restart()
    assert (served.regions(), own_files()) == ([], before)
    np.testing.assert_allclose(classifier.classify(batch), expected, **TOLERANCE)
    assert served.regions() == own_files() != before


def test_no_answer_is_lost_or_wrong_while_triton_is_killed(
    served: Served, shared: InferenceClient, own_files: Callable[[], list[str]]
) -> None:
    """Callers under way learn that Triton is away; a retry gets the right logits."""
    classifier, stop = served.classifier(shared), threading.Event()
    batches = [images(20 + thread, seed=thread) for thread in range(4)]
    expected = [served.over_grpc(batch) for batch in batches]
    answered, away = [0] * 4, [0] * 4

    def ask(thread: int) -> None:
        while not stop.is_set():
            pending = []
            try:
                pending = [classifier.submit(batches[thread]) for _ in range(3)]
                answers = [one.result() for one in pending]
            except Unavailable:
                away[thread] += 1
                stop.wait(0.05)
                continue
            for logits in answers:
                np.testing.assert_allclose(logits, expected[thread], **TOLERANCE)
            answered[thread] += 1

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(ask, thread) for thread in range(4)]
        try:
            for _ in range(2):
                wait_for_more(answered)
                served.kill()
                wait_for_more(away)
                served.restart()
            wait_for_more(answered)
        finally:
            stop.set()
        for one in running:
            one.result(60)
    assert len(own_files()) <= 2
    assert set(served.regions()) == set(own_files())


def wait_for_more(counts: list[int]) -> None:
    """Wait until each of the counts has risen by three."""
    before = list(counts)
    eventually(lambda: all(now >= then + 3 for now, then in zip(counts, before, strict=True)))


@pytest.mark.usefixtures("no_gpu")
def test_cuda_shared_memory_without_a_gpu(served: Served) -> None:
    """Asked for by name, what cannot work is refused by that name, when images are sent, not when it is made."""
    client = InferenceClient(served.address, transport=CUDA_SHARED_MEMORY)
    with pytest.raises(Unavailable, match=r"DEFUSE_TRITON_TRANSPORT is 'cuda-shared-memory'.*'auto'") as caught:
        served.classifier(client).classify(images(1))
    assert caught.value.reason == "TRANSPORT_REFUSED"


@needs_cuda
def test_cuda_shared_memory_gives_the_same_logits(served: Served) -> None:
    """Images on the device, and in numpy, are answered as over gRPC."""
    with closing(InferenceClient(served.address, transport=CUDA_SHARED_MEMORY)) as client:
        for count in SIZES:
            batch = images(count)
            for sent in (batch, torch.from_numpy(batch).cuda()):
                logits = served.classifier(client).classify(sent)
                np.testing.assert_allclose(logits, served.over_grpc(batch), **TOLERANCE)


@needs_cuda
def test_auto_shares_a_gpu_with_a_triton_on_this_host(served: Served) -> None:
    """Left to itself the client takes the memory of the GPU where there is one."""
    with closing(InferenceClient(served.address)) as client:
        served.classifier(client).classify(images(3))
        assert client.transport == CUDA_SHARED_MEMORY
