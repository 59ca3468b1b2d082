"""Items into even parts, by hand and by hypothesis; what a whole window holds to is in test_plan.py."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.window import cut_evenly


@given(st.lists(st.integers(1, 6), min_size=1, max_size=40), st.data())
def test_parts_are_cut_in_order_and_even_up_to_an_item(sizes, data):
    parts = data.draw(st.integers(1, max(1, sum(sizes) // max(sizes))))
    part = cut_evenly(np.array(sizes), parts).tolist()
    assert part == sorted(part) and set(part) == set(range(parts))
    held = [sum(size for size, p in zip(sizes, part) if p == number) for number in range(parts)]
    assert all(abs(h - sum(sizes) / parts) < max(sizes) for h in held)
