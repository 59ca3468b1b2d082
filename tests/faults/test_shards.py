"""Shards damaged, cut, gone, poisoned or silent while two ranks train: the right losses, or one clear error."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist
from ranks import RankError
from small_run import Case, Recorder, SmallRun, plain_losses, zero_options

from proteingpt.config import DevicesConfig
from proteingpt.data import set_aside
from proteingpt.data.loader import prefetch
from proteingpt.data.set_aside import SetAside
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.training.balance import Balance
from proteingpt.training.loop import train

RELATIVE = 1e-5


def copy_of(assets, directory, change=lambda number, sample: sample):
    """The demo's training samples in four shards of four, with its encoders."""
    shards = ShardSet(assets, "train")
    samples = [change(i, shards.read(i)) for i in range(len(shards))]
    write_shards(directory, {"train": samples, "test": []}, samples_per_shard=4, options={})
    for name in ("esm2_demo.pt", "esm_if1_demo.pt"):
        shutil.copy(assets / name, directory)
    return directory


@pytest.fixture(scope="module")
def make_case(qwen2):
    return lambda directory: Case(str(directory), str(qwen2), "projector", zero_options("zero2"))


@pytest.fixture(scope="module")
def clean(demo_assets, tmp_path_factory, make_case):
    return make_case(copy_of(demo_assets, tmp_path_factory.mktemp("clean")))


def flip(directory, sample: int):
    """A bit of a coordinate."""
    shard, line = divmod(sample, 4)
    record = json.loads((directory / f"train-{shard:05d}.index.jsonl").read_text().splitlines()[line])
    path = directory / f"train-{shard:05d}.tar"
    content = bytearray(path.read_bytes())
    content[record["members"]["backbone.npy"][0] + 300] ^= 64
    path.write_bytes(content)


def train_on(
    rank, device, case: Case, fault: str, report: str, timeout_seconds=60.0, max_share=1.0, fewest=100
) -> dict:
    """The real loop over the real reader. The fault comes once both know the shards."""
    run = SmallRun(case)
    engine = run.engine()
    # Not yet opened, as where the token index was there already: what is open can be read even when it is gone.
    run.shards = run.data.shards = ShardSet(case.assets, "train")
    cause(rank, case, fault)
    set_aside.FEWEST_READ = fewest
    run.data.set_aside = SetAside(f"{report}-{rank.rank}", max_share)
    balance, recorder, last = Balance(DevicesConfig(balance="equal"), device), Recorder(), run.plan.num_steps

    def read(first: int):
        return prefetch(
            lambda step: run.work(engine, rank, step, balance), first, last,
            timeout_seconds=timeout_seconds, activity=run.shards.activity,
        )  # fmt: skip

    train(
        engine, run.encoders, read, run.stage, recorder, balance, device,
        first_step=0, num_steps=last, after_step=lambda step: None,
    )  # fmt: skip
    engine.close()
    return {"losses": recorder.losses, "set_aside": run.data.set_aside.reasons}


def cause(rank, case: Case, fault: str):
    dist.barrier()  # both know what there is
    path = f"{case.assets}/train-00001.tar"
    if rank.is_first and fault == "truncated":
        os.truncate(path, os.path.getsize(path) // 2)
    if rank.is_first and fault in ("vanished", "silent"):
        os.unlink(path)
    if rank.is_first and fault == "silent":
        os.mkfifo(path)
    dist.barrier()


def poison(number: int, sample):
    """A coordinate that overflows in a distance, in a member whose checksum is right."""
    if number != 6:
        return sample
    backbone = sample.protein.backbone.copy()
    backbone[3, 1, 2] = 3e38
    return replace(sample, protein=replace(sample.protein, backbone=backbone))


@pytest.mark.parametrize("fault", ["flipped", "truncated", "vanished", "poisoned"])
def test_the_run_goes_on_as_if_what_cannot_be_read_had_no_weight(
    worlds, demo_assets, clean, make_case, tmp_path, fault
):
    directory = copy_of(demo_assets, tmp_path / "shards", **({"change": poison} if fault == "poisoned" else {}))
    if fault == "flipped":
        flip(directory, 6)
    keys = ShardSet(directory, "train").keys
    # The first half of the shard is whole: its samples are.
    out = {"flipped": keys[6:7], "truncated": keys[6:8], "vanished": keys[4:8], "poisoned": keys[6:7]}[fault]
    ranks = worlds(2)(train_on, make_case(directory), fault, str(tmp_path / "set_aside"))
    named = {key for rank in ranks for key in rank["set_aside"]}
    assert named and named <= set(out)
    losses, _ = plain_losses(clean, frozenset(out))
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=RELATIVE)
    whole, _ = plain_losses(clean)
    assert not np.allclose(whole, losses, rtol=RELATIVE)  # it matters
    lines = [json.loads(line) for path in tmp_path.glob("set_aside-*") for line in path.read_text().splitlines()]
    assert {line["key"] for line in lines} == named and all("train-00001.tar" in line["reason"] for line in lines)


def test_more_than_the_set_share_ends_the_run_and_says_so(worlds, demo_assets, make_case, tmp_path):
    directory = copy_of(demo_assets, tmp_path / "shards")
    with pytest.raises(RankError, match=r"samples that this rank read could not be used, more than data.max_bad_share"):
        worlds(2)(train_on, make_case(directory), "vanished", str(tmp_path / "set_aside"), 60.0, 0.01, 4)


def test_a_shard_that_gives_nothing_is_named_after_the_set_time(worlds, demo_assets, make_case, tmp_path):
    directory = copy_of(demo_assets, tmp_path / "shards")
    said = r"waits for data: nothing came for \d+ s from shard .*train-00001.tar"
    with pytest.raises(RankError, match=said) as raised:
        worlds(2)(train_on, make_case(directory), "silent", str(tmp_path / "set_aside"), 2.0)
    assert "ReadTimeout" in str(raised.value)
