"""What is written can be read; what was broken since is named and passed over."""

import dataclasses
import json
import logging
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from proteingpt.training import checkpoint
from proteingpt.training.checkpoint import CheckpointError, Progress, newest_valid, save, verify

FILES = ["checkpoint.json", "exp_avg.safetensors", "exp_avg_sq.safetensors", "weights.safetensors"]


def make_state(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"projector.structure.weight": (3, 5), "projector.structure.bias": (3,)}
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }


def progress(steps_done: int) -> Progress:
    agreed = [[0, [1.0, 0.1]], [11, [1 / 3, 2e-9]]]
    return Progress("instruct", steps_done, num_steps=40, plan="abc123", speeds=agreed, devices=["NVIDIA H100", "CPU"])


def same(found, wanted) -> bool:
    return all(torch.equal(found[kind][name], value) for kind, kinds in wanted.items() for name, value in kinds.items())


@pytest.fixture
def two(tmp_path):
    """(the folder, the checkpoint of step 10, that of step 20)."""
    return tmp_path, *(save(tmp_path, make_state(step), progress(step), keep_last=5) for step in (10, 20))


def test_what_was_saved_is_read_to_the_bit(two):
    folder, older, newer = two
    assert newest_valid(folder) == newer
    for step, path in ((10, older), (20, newer)):
        assert same(checkpoint.read_state(path), make_state(step))
        assert same({"weights": checkpoint.read_weights(path)}, {"weights": make_state(step)["weights"]})
        assert checkpoint.read_progress(path) == progress(step)
        assert sorted(file.name for file in path.iterdir()) == FILES


def test_no_checkpoint_is_none(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "not there") is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def lose(path):
    path.unlink()


DAMAGE = [(cut, name) for name in FILES] + [(lose, name) for name in FILES] + [(empty, name) for name in FILES]
DAMAGE += [(flip, name) for name in FILES if name != "checkpoint.json"]


@pytest.mark.parametrize("damage, name", DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_one_is_named_and_the_one_before_is_taken(two, caplog, damage, name):
    folder, older, newer = two
    damage(newer / name)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(folder) == older
    assert newer.name in caplog.text and name in caplog.text
    with pytest.raises(CheckpointError, match=name):
        verify(newer)


# Valid JSON, but no description of a checkpoint: what a disk, or a hand, may leave.
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"sha256": {}}', "\x00" * 50], ids=repr)
def test_an_unusable_description_is_passed_over(two, caplog, text):
    folder, older, newer = two
    (newer / "checkpoint.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(folder) == older
    assert newer.name in caplog.text


def test_a_description_that_forgot_a_file_does_not_verify(two):
    """A checksum that is not there must not count as one that holds."""
    folder, older, newer = two
    description = json.loads((newer / "checkpoint.json").read_text())
    del description["sha256"]["exp_avg.safetensors"]
    (newer / "checkpoint.json").write_text(json.dumps(description))
    assert newest_valid(folder) == older


def test_where_all_are_broken_the_run_stops_and_all_are_named(two, caplog):
    folder, older, newer = two
    for path in (older, newer):
        flip(path / "weights.safetensors")
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="all 2 checkpoints .* are broken"):
        newest_valid(folder)
    assert older.name in caplog.text and newer.name in caplog.text


def test_what_a_killed_save_left_is_no_checkpoint_and_does_not_disturb_the_next(two):
    folder, _, newer = two
    partial = folder / ".step-00000030.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    (partial / "stray").write_bytes(b"")
    assert newest_valid(folder) == newer
    path = save(folder, make_state(30), progress(30), keep_last=5)
    assert newest_valid(folder) == path and not partial.exists()
    assert sorted(file.name for file in path.iterdir()) == FILES


@pytest.mark.parametrize("text", [None, "step-00000010\n", "step-99999999\n", ""])
def test_latest_may_be_stale_or_lost(two, text):
    """Killed between the rename and the write of `latest`: the newest is still found."""
    folder, _, newer = two
    latest = folder / "latest"
    assert latest.read_text() == "step-00000020\n"
    latest.unlink() if text is None else latest.write_text(text)
    assert newest_valid(folder) == newer


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 100):
        save(tmp_path, make_state(step), progress(step), keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000010", "step-00000100"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"


def test_the_same_step_may_be_saved_again(two):
    folder, _, newer = two
    flip(newer / "weights.safetensors")
    assert save(folder, make_state(7), progress(20), keep_last=5) == newer
    assert newest_valid(folder) == newer and same(checkpoint.read_state(newer), make_state(7))


def test_a_step_beyond_eight_digits_is_the_newest(tmp_path):
    save(tmp_path, make_state(1), progress(99_999_999), keep_last=5)
    newest = save(tmp_path, make_state(2), progress(100_000_000), keep_last=5)
    assert newest_valid(tmp_path) == newest


def test_a_failed_save_leaves_the_old_one_and_nothing_of_itself(two):
    """For real: files may grow to 100 bytes only, as on a disk without room."""
    folder, _, newer = two
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError, match="step-00000020 cannot be written"):
            save(folder, make_state(3), progress(20), keep_last=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert newest_valid(folder) == newer and same(checkpoint.read_state(newer), make_state(20))
    assert not list(folder.glob(".*"))


def test_odd_times_of_files_change_nothing(tmp_path):
    """A clock that was set back, or runs ahead: steps tell the order."""
    for step, when in ((10, 4_000_000_000), (20, 86_400), (30, 1_000_000_000)):
        path = save(tmp_path, make_state(step), progress(step), keep_last=2)
        for file in (*path.iterdir(), path):
            os.utime(file, (when, when))
    assert newest_valid(tmp_path).name == "step-00000030"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000020", "step-00000030"]


def test_the_best_is_kept_beside_the_last(tmp_path):
    for step in range(1, 7):
        path = save(tmp_path, make_state(step), progress(step), keep_last=2)
        if step in (2, 3):
            checkpoint.mark_best(path, "loss", 1.0 / step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000005", "step-00000006"]
    assert checkpoint.read_best(tmp_path) == {"checkpoint": "step-00000003", "metric": "loss", "value": 1 / 3}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"checkpoint": "../../x", "metric": "loss", "value": 1.0}', "[" * 100_000]
)
def test_a_mark_of_the_best_that_cannot_be_is_none(two, text):
    folder, *_ = two
    (folder / "best.json").write_text(text)
    assert checkpoint.read_best(folder) is None


HOSTILE = {
    "stage": [1, None], "steps_done": [-1, 2.5, True, "10", 2**60, None], "plan": [None, 7], "speeds": ["fast", [[0]],
    [[0, ["x"]]], [[0, [float("nan")]]], [[-1, [1.0]]], {"0": 1}], "identity": [[], {"data": 7}],
    "devices": ["CPU", [1], {"0": "CPU"}],
}  # fmt: skip


def test_a_checkpoint_from_before_devices_were_named_is_read(two):
    _, _, newer = two
    description = json.loads((newer / "checkpoint.json").read_text())
    (newer / "checkpoint.json").write_text(json.dumps({k: v for k, v in description.items() if k != "devices"}))
    verify(newer)
    assert checkpoint.read_progress(newer) == dataclasses.replace(progress(20), devices=None)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in HOSTILE.items() for value in values], ids=repr
)
def test_a_description_whose_values_cannot_be_is_broken(two, name, value):
    folder, older, newer = two
    description = json.loads((newer / "checkpoint.json").read_text())
    (newer / "checkpoint.json").write_text(json.dumps({**description, name: value}))
    with pytest.raises(CheckpointError, match=f"has a {name} that cannot be"):
        verify(newer)
    assert newest_valid(folder) == older


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' * 100_000, "1" * 100_000, " " * (2**24 + 1)], ids=len)
def test_a_description_that_would_exhaust_the_parser_is_broken(two, text):
    folder, older, newer = two
    (newer / "checkpoint.json").write_text(text)
    assert newest_valid(folder) == older


def test_a_checkpoint_is_compared_with_what_trains_before_it_is_loaded(two):
    _, _, newer = two
    shapes = {"projector.structure.weight": (3, 5), "projector.structure.bias": (3,)}
    checkpoint.check_fits(newer, shapes)
    for wrong in (
        {**shapes, "projector.structure.bias": (4,)},
        {**shapes, "more": (1,)},
        {"projector.structure.bias": (3,)},
    ):
        with pytest.raises(CheckpointError, match="does not fit what trains here"):
            checkpoint.check_fits(newer, wrong)
    save_file(
        {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, newer / "exp_avg.safetensors"
    )
    with pytest.raises(CheckpointError, match="exp_avg.safetensors, .* is .'F16'"):
        checkpoint.check_fits(newer, shapes)


def test_what_a_run_was_made_of_is_compared_by_name():
    saved, found = {"data": "a" * 64, "esm2": "b" * 64, "older": "x"}, {"data": "c" * 64, "esm2": "b" * 64, "llm": "d"}
    (line,) = checkpoint.identity_differences(saved, found)
    assert line == f"data has changed (was {'a' * 12}, is {'c' * 12})"
    assert checkpoint.identity_differences(saved, found, allowed=("data",)) == []
    assert checkpoint.identity_differences(None, found) == []


def test_broken_ones_of_later_steps_do_not_push_a_whole_one_out(tmp_path):
    """Steps 20 and 30 are broken, so the run went back to 10 and now saves 20 again: of one to keep, that one."""
    for step in (10, 20, 30):
        flip(save(tmp_path, make_state(step), progress(step), keep_last=5) / "weights.safetensors")
    path = save(tmp_path, make_state(20), progress(20), keep_last=1)
    assert newest_valid(tmp_path) == path
    assert list(tmp_path.glob("step-*")) == [path]


def test_a_copy_that_somebody_put_beside_is_left_alone(two):
    folder, _, newer = two
    newer.rename(folder / "step-00000020.bad")
    path = save(folder, make_state(30), progress(30), keep_last=1)
    assert newest_valid(folder) == path
    assert (folder / "step-00000020.bad").is_dir()
