import pytest
from defuse.hooks.observation import IdGenerator, Sampler


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 1.0])
def test_the_share_of_many(share: float) -> None:
    """Of consecutive ids, and of others, the share is taken that was asked for."""
    sampler = Sampler(share)
    for ids in ([f"request-{number}" for number in range(20_000)], [f"{number:032x}" for number in range(20_000)]):
        assert sum(map(sampler.samples, ids)) / len(ids) == pytest.approx(share, abs=4 * (0.25 / 20_000) ** 0.5)


def test_the_same_id_in_every_process() -> None:
    """What is decided about an id is part of the hook's promise: services before and behind each other agree."""
    assert [number for number in range(20) if Sampler(0.25).samples(str(number))] == [2, 6, 17, 18]


def test_a_larger_share_has_the_smaller_one_in_it() -> None:
    ids = [str(number) for number in range(1_000)]
    assert {one for one in ids if Sampler(0.1).samples(one)} < {one for one in ids if Sampler(0.2).samples(one)}


def test_rows_go_with_their_request() -> None:
    """The truth of a row is sent where the row was."""
    sampler = Sampler(0.5)
    for request_id in map(str, range(200)):
        if sampler.samples(request_id):
            assert sampler.may_have_sampled(f"{request_id}-7")
            assert sampler.may_have_sampled(request_id)
    assert not Sampler(0.0).may_have_sampled("a-7")


def test_ids_of_those_that_have_none() -> None:
    """None is given twice, by one counter or by two."""
    one, other = IdGenerator(), IdGenerator()
    found = [numbers.next_id() for _ in range(100) for numbers in (one, other)]
    assert len(set(found)) == 200
    assert max(map(len, found)) < 64


def test_an_id_of_any_characters() -> None:
    assert Sampler(1.0).samples("\ud800 ü")
