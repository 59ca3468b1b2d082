"""What is done with a step, by hand and for any run of steps: nothing of a framework, plain numbers."""

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.config import GuardConfig, RunConfig, from_dict, read_recipe
from proteingpt.training.guard import (
    Action,
    GuardState,
    Seen,
    carried_over,
    decide,
    fault,
    is_high,
    passed,
    read_state,
)

NAN, INF = math.nan, math.inf
SMALL = GuardConfig(spike_factor=3.0, norm_factor=3.0, window=8, quarantine_after=2, roll_back_after=3, roll_backs=1)


def run(config, steps, state=GuardState()):
    """[(loss, norm, samples), ...] -> (state, decisions). Steps are numbered from 0."""
    decisions = []
    for number, (loss, norm, *samples) in enumerate(steps):
        state, decision = decide(state, config, Seen(number, loss, norm, tuple(samples)))
        decisions.append(decision)
    return state, decisions


HEALTHY = [(2.0, 0.5)] * 4  # half a window


def actions(decisions):
    return [decision.action for decision in decisions]


# -------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "loss, norm, words",
    [
        (NAN, 0.5, "loss is not finite"),
        (INF, 0.5, "loss is not finite"),
        (2.0, NAN, "gradient is not finite"),
        (6.1, 0.5, "loss is 6.1, where 2 is usual"),
        (2.0, 1.6, "gradient is 1.6, where 0.5 is usual"),
        (6.0, 1.5, None),
    ],
)
def test_what_is_a_fault(loss, norm, words):
    """Median loss 2.0 and norm 0.5, factor 3: bounds 6.0 and 1.5."""
    state, _ = run(SMALL, HEALTHY)
    said = fault(state, SMALL, Seen(9, loss, norm))
    assert said is None if words is None else words in said


def test_nothing_is_a_spike_before_half_a_window_has_been_seen():
    state, _ = run(SMALL, HEALTHY[:3])
    assert fault(state, SMALL, Seen(3, 1e9, 1e9)) is None
    state, _ = run(SMALL, HEALTHY)
    assert fault(state, SMALL, Seen(4, 1e9, 0.5)) is not None


def test_what_is_small_in_itself_is_no_spike():
    """Late in a run a loss of 0.01 is usual: 0.9 is a hard question. A norm below 1 is not even clipped."""
    state, _ = run(SMALL, [(0.01, 0.01)] * 8)
    assert fault(state, SMALL, Seen(8, 0.9, 0.9)) is None
    assert fault(state, SMALL, Seen(8, 1.02, 0.9)) and fault(state, SMALL, Seen(8, 0.9, 1.01))
    assert is_high(state, SMALL, 1.02) and not is_high(state, SMALL, 1.0)


def test_without_a_factor_only_what_is_not_finite_is_bad():
    config = replace(SMALL, spike_factor=None, norm_factor=None)
    state, _ = run(config, HEALTHY * 4)
    assert fault(state, config, Seen(9, 1e30, 1e30)) is None and fault(state, config, Seen(9, NAN, 1.0))


@pytest.mark.parametrize("name", ["paper-align", "paper-instruct", "released-align", "released-instruct"])
def test_with_four_samples_a_step_only_what_is_not_finite_is_skipped(name):
    """Steps of 0.02 nats a token, and then one whose four short answers have one that is missed by 6: healthy, and
    1.5."""
    guard = from_dict(RunConfig, read_recipe(name)).guard
    usual = GuardState(losses=(0.02,) * guard.window, norms=(0.01,) * guard.window)
    missed = Seen(100, (3 * 0.02 + 6) / 4, 2.0)
    assert fault(usual, guard, missed) is None and fault(usual, GuardConfig(), missed) is not None
    assert fault(usual, guard, Seen(100, NAN, 2.0)) is not None


def test_a_bad_step_is_skipped_and_is_not_part_of_what_is_usual():
    state, decisions = run(SMALL, [*HEALTHY, (50.0, 0.5, "a", "b"), (2.0, 0.5)])
    assert actions(decisions) == [Action.TAKE] * 4 + [Action.SKIP, Action.TAKE]
    assert state.losses == (2.0,) * 5 and state.not_taken == 1 and state.skipped == (4,) and state.row == ()
    assert dict(state.strikes) == {"a": 1, "b": 1} and state.quarantined == ()


def test_a_sample_in_two_bad_steps_is_quarantined_and_those_beside_it_are_not():
    steps = [*HEALTHY, (NAN, 0.5, "a", "b"), (2.0, 0.5), (NAN, 0.5, "c", "b")]
    state, decisions = run(SMALL, steps)
    assert decisions[-1].quarantined == ("b",) == state.quarantined
    again, decision = decide(state, SMALL, Seen(9, NAN, 0.5, ("b", "d")))
    assert decision.quarantined == () and again.quarantined == ("b",)


def test_three_bad_steps_in_a_row_go_back_and_the_next_three_end_the_run():
    state, decisions = run(SMALL, [*HEALTHY, (NAN, 1.0), (9.0, 1.0), (NAN, 1.0)])
    assert actions(decisions)[4:] == [Action.SKIP, Action.SKIP, Action.ROLL_BACK]
    assert state.passed_over == (4, 5, 6) and state.roll_backs == 1 and state.row == state.skipped == ()
    state, decisions = run(SMALL, [(NAN, 1.0)] * 3, state)
    assert actions(decisions) == [Action.SKIP, Action.SKIP, Action.STOP]


def test_bad_steps_with_good_ones_between_them_end_the_run_when_they_are_the_most():
    """Of 8 steps 5: one more than half."""
    bad, good = (NAN, 1.0, "x"), (2.0, 0.5)
    _, decisions = run(SMALL, [bad, good, bad, bad, good, bad, bad])
    assert actions(decisions)[-2:] == [Action.SKIP, Action.STOP]


def test_what_goes_on_after_going_back():
    """Usual losses and the count of updates are the checkpoint's; what is known of samples stays."""
    saved, _ = run(SMALL, HEALTHY)
    later, _ = run(SMALL, [(1.0, 0.1), (NAN, 1.0, "a"), (NAN, 1.0, "a"), (NAN, 1.0)], passed(saved))
    state = carried_over(later, saved)
    assert state.losses == saved.losses and state.not_taken == 0
    assert state.quarantined == ("a",) and state.passed_over == (1, 2, 3) and state.roll_backs == 1


def test_a_checkpoint_without_a_state_is_one_of_a_new_run():
    assert read_state(None) == GuardState() == read_state({})


# ------------------------------------------------------------------------------------------------------ for any run

NUMBERS = st.one_of(st.floats(0, 20), st.sampled_from([NAN, INF]))
STEPS = st.lists(st.tuples(NUMBERS, NUMBERS, st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=60)
CONFIGS = st.builds(
    GuardConfig, spike_factor=st.none() | st.floats(1.5, 20), norm_factor=st.none() | st.floats(1.5, 20),
    window=st.integers(1, 20), quarantine_after=st.integers(1, 4),
    roll_back_after=st.integers(1, 5), roll_backs=st.integers(0, 3),
)  # fmt: skip


@given(CONFIGS, STEPS)
def test_promises(config, steps):
    state, bad_of, in_a_row, taken = GuardState(), {}, 0, 0
    for number, (loss, norm, *samples) in enumerate(steps):
        before = state
        state, decision = decide(state, config, Seen(number, loss, norm, tuple(samples)))
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        # What is not finite never reaches the weights; what is taken is remembered.
        assert is_finite or decision.action is not Action.TAKE
        if decision.action is Action.TAKE:
            taken, in_a_row = taken + 1, 0
            assert state.losses[-1] == loss and state.strikes == before.strikes
        else:
            in_a_row += 1
            for key in set(samples):
                bad_of[key] = bad_of.get(key, 0) + 1
            assert in_a_row < config.roll_back_after or decision.action in (Action.ROLL_BACK, Action.STOP)
            assert decision.why
        if decision.action is Action.ROLL_BACK:
            in_a_row = 0
        # A plain count says who is quarantined, each once.
        assert set(state.quarantined) == {key for key, n in bad_of.items() if n >= config.quarantine_after}
        assert len(state.quarantined) == len(set(state.quarantined))
        assert state.roll_backs <= config.roll_backs and len(state.losses) == len(state.norms) <= config.window
        assert len(state.skipped) <= config.window and all(math.isfinite(value) for value in state.losses + state.norms)
        assert state.not_taken + taken == number + 1
        if decision.action is Action.STOP:
            break


@given(CONFIGS, STEPS, st.integers(0, 59))
def test_a_state_goes_through_json_and_decides_the_same(config, steps, at):
    """So a resumed run repeats what an uninterrupted one does."""
    state, _ = run(config, steps[:at])
    restored = read_state(json.loads(json.dumps(asdict(state))))
    assert restored == state
    assert run(config, steps[at:], state) == run(config, steps[at:], restored)


@given(st.lists(st.floats(0.5, 4.9), min_size=1, max_size=80), st.floats(10, 100))
def test_steps_within_a_factor_of_each_other_are_all_taken(losses, factor):
    config = replace(SMALL, spike_factor=factor, norm_factor=factor)
    assert set(actions(run(config, [(loss, loss) for loss in losses])[1])) == {Action.TAKE}
