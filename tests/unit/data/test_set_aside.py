"""Samples that cannot be read: named once, written down, and too many of them end the run."""

import json

import pytest

from proteingpt.data.set_aside import FEWEST_READ, SetAside, TooManyBad
from proteingpt.data.shards import BadSample


def bad(key: str) -> BadSample:
    return BadSample("shards/train-00000.tar", key, "backbone.npy: wrong checksum")


def test_each_is_named_once_in_log_and_file(tmp_path, caplog):
    path = tmp_path / "set_aside.jsonl"
    aside = SetAside(path)
    for key in ("1abc_A", "2abc_A", "1abc_A"):
        aside.bad(key, bad(key))
    assert caplog.text.count("sample 1abc_A, backbone.npy: wrong checksum") == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"key": key, "shard": "shards/train-00000.tar", "reason": str(bad(key))}
        for key in ("1abc_A", "2abc_A")
    ]
    assert aside.num_read == aside.num_bad_reads == 3 and list(aside.reasons) == ["1abc_A", "2abc_A"]


def test_the_share_is_of_what_was_read_and_is_taken_only_of_enough():
    """2 bad ones of 100 are 2 %, and with a third among 151 still no more."""
    aside = SetAside(max_share=0.02)
    for n in (1, 2):
        aside.bad(str(n), bad(str(n)))  # all that was read so far, and no reason to stop
    for _ in range(FEWEST_READ - 2 + 50):
        aside.good()
    aside.bad("3", bad("3"))
    with pytest.raises(TooManyBad, match=r"4 of 152 .* more than data.max_bad_share \(0.02\); the last: .*sample 4,"):
        aside.bad("4", bad("4"))


def test_none_at_all_may_be_asked_for():
    aside = SetAside(max_share=0.0)
    for _ in range(FEWEST_READ - 1):
        aside.good()
    with pytest.raises(TooManyBad, match="1 of 100 samples"):
        aside.bad("1", bad("1"))
