"""Running ahead: one item is begun before the one in front of it is given out."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.encoders.ahead import RunAhead, one_ahead


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


class Slow:
    def encode(self, proteins):
        sum(range(20_000))
        return [torch.ones(2, 3)] * len(proteins), [torch.ones(2, 4)] * len(proteins)


def test_on_a_cpu_work_passes_as_it_is_and_the_time_of_encoders_is_counted_once():
    ahead, closed = RunAhead(Slow(), torch.device("cpu")), []

    def work():
        try:
            yield from "abc"
        finally:
            closed.append(True)

    stream = ahead.of(work())
    assert next(stream) == "a" and not closed
    stream.close()
    assert closed == [True]
    structure, sequence = ahead.rows(SimpleNamespace(rows=None, proteins=["p", "q"]))
    assert len(structure) == len(sequence) == 2
    assert ahead.take_seconds() > 0 and ahead.take_seconds() == 0


def test_rows_that_came_with_the_pack_are_taken_and_no_encoder_is_asked():
    ahead = RunAhead(None, torch.device("cpu"))
    pairs = [(torch.ones(3, 2), torch.zeros(3, 5)), (torch.ones(4, 2), torch.zeros(4, 5))]
    structure, sequence = ahead.rows(SimpleNamespace(rows=pairs, proteins=["p", "q"]))
    assert [len(r) for r in structure] == [3, 4] and [r.shape[1] for r in sequence] == [5, 5]
