"""Running ahead: one item is begun before the one in front of it is given out; on a CPU, with a real thread, as on a
GPU."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.config import EncodersConfig
from proteingpt.encoders.ahead import RunAhead, one_ahead
from proteingpt.encoders.pair import Encoders, Remembering

CPU = torch.device("cpu")


@given(st.lists(st.integers()))
def test_items_come_in_order_and_the_next_has_always_begun(items):
    begun = []

    def begin(item):
        begun.append(item)
        return -item

    for number, (item, result) in enumerate(one_ahead(iter(items), begin)):
        assert (item, result) == (items[number], -items[number])
        assert begun == items[: number + 2]
    assert begun == items


@pytest.fixture(scope="module")
def encoders(esm2_file, esm_if1_file):
    return Encoders.load(EncodersConfig(esm2=str(esm2_file), esm_if1=str(esm_if1_file), dtype="float32"), CPU)


class Watched:
    """The encoders, who asked them from which thread, and what befalls them."""

    def __init__(self, encoders):
        self.encoders, self.asked, self.errors = encoders, [], {}

    def encode(self, proteins):
        here = "thread" if threading.current_thread() is not threading.main_thread() else "main"
        for protein in proteins:
            self.asked.append((protein.key, here))
            if (protein.key, here) in self.errors:
                raise self.errors[protein.key, here]
        return self.encoders.encode(proteins)


@pytest.fixture
def watched(encoders):
    return Watched(encoders)


@pytest.fixture(scope="module")
def steps(make_protein):
    """Three steps of two packs; the protein `p1` is in every one, `p4` in the last two."""
    proteins = {n: dataclasses.replace(make_protein(6 + n), id=f"p{n}") for n in range(7)}
    packs = [[[0, 1], [2]], [[1, 3], [4]], [[4, 1], [5, 6]]]
    return [
        SimpleNamespace(packs=[SimpleNamespace(rows=None, proteins=[proteins[n] for n in pack]) for pack in step])
        for step in packs
    ]


def assert_rows(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_the_thread_gives_every_pack_the_rows_of_the_encoders_to_the_bit(encoders, watched, steps, max_bytes):
    ahead, closed = RunAhead(Remembering(watched, max_bytes), CPU, ahead=True), []

    def work():
        try:
            yield from steps
        finally:
            closed.append(True)

    for step in ahead.of(work()):
        for pack in step.packs:
            assert_rows(ahead.rows(pack), encoders.encode(pack.proteins))
    assert closed == [True] and {where for _, where in watched.asked} == {"thread"}
    asked = [key for key, _ in watched.asked]
    # p1 is asked for anew until the step that it was first begun for has been trained; remembered, not again after
    # that.
    assert asked.count("p1_A") == (2 if max_bytes else 3) and asked.count("p0_A") == 1
    working, waited = ahead.take_seconds()
    assert working > 0 and waited > 0 and ahead.take_seconds() == (0, 0)


def test_what_the_thread_raises_is_raised_where_the_rows_are_wanted_and_nowhere_else(watched, steps):
    watched.errors["p4_A", "thread"] = ValueError("a bad protein")
    ahead = RunAhead(Remembering(watched, 0), CPU, ahead=True)
    work = ahead.of(iter(steps))
    for pack in next(work).packs:
        ahead.rows(pack)
    second = next(work)
    with pytest.raises(ValueError, match="a bad protein"):
        ahead.rows(second.packs[0])
    work.close()


def test_where_the_thread_lacks_memory_the_step_asks_again(encoders, watched, steps):
    watched.errors["p3_A", "thread"] = torch.OutOfMemoryError("none left")
    ahead = RunAhead(Remembering(watched, 0), CPU, ahead=True)
    for step in ahead.of(iter(steps)):
        for pack in step.packs:
            assert_rows(ahead.rows(pack), encoders.encode(pack.proteins))
    assert [key for key, where in watched.asked if where == "main"] == ["p1_A", "p3_A", "p4_A"]


def test_when_the_work_is_closed_the_thread_has_ended_its_own(watched, steps):
    """What comes next would find its memory and its time taken."""
    ahead = RunAhead(Remembering(watched, 0), CPU, ahead=True)
    work = ahead.of(iter(steps))
    next(work)
    work.close()
    asked = len(watched.asked)
    assert asked == 6, "two steps were begun"
    ahead.thread.submit(int).result()
    assert len(watched.asked) == asked


def test_without_a_thread_work_passes_as_it_is_and_the_time_of_encoders_is_counted_once(encoders, watched, steps):
    ahead = RunAhead(Remembering(watched, 0), CPU)
    work = ahead.of(iter(steps))
    assert next(work) is steps[0] and not watched.asked
    pack = steps[0].packs[0]
    assert_rows(ahead.rows(pack), encoders.encode(pack.proteins))
    assert {where for _, where in watched.asked} == {"main"}
    working, waited = ahead.take_seconds()
    assert working == waited > 0 and ahead.take_seconds() == (0, 0)


def test_rows_that_came_with_the_pack_are_taken_and_no_encoder_is_asked(watched):
    pairs = [(torch.ones(3, 2), torch.zeros(3, 5)), (torch.ones(4, 2), torch.zeros(4, 5))]
    pack = SimpleNamespace(rows=pairs, proteins=["p", "q"])
    for ahead in (RunAhead(Remembering(watched, 0), CPU), RunAhead(Remembering(watched, 0), CPU, ahead=True)):
        for _ in ahead.of(iter([SimpleNamespace(packs=[pack])])):
            structure, sequence = ahead.rows(pack)
            assert [len(r) for r in structure] == [3, 4] and [r.shape[1] for r in sequence] == [5, 5]
    assert not watched.asked
