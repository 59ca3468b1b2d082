"""An embedding cache that is killed, for real, goes on where it was and ends with the bytes of one that was not."""

import shutil
from pathlib import Path

import pytest
from killing import content, killed_at

from proteingpt.config import EncodersConfig
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.distributed import Rank, start
from proteingpt.encoders.cache_run import cache_embeddings

ALONE = Rank(0, 1, 0, "127.0.0.1", 0, "none")


@pytest.fixture(scope="module")
def data(demo_assets, tmp_path_factory):
    """Six proteins in three shards."""
    directory = tmp_path_factory.mktemp("data")
    shards = ShardSet(demo_assets, "train")
    samples = [shards.read(number) for number in range(6)]
    write_shards(directory, {"train": samples[:4], "test": samples[4:]}, samples_per_shard=2, options={})
    return directory


def cache_in_child(data: Path, out: Path, assets: Path, last_event: int | None) -> bool:
    weights = {"esm2": f"{assets}/esm2_demo.pt", "esm_if1": f"{assets}/esm_if1_demo.pt"}
    return killed_at(last_event, out, lambda: cache_embeddings(data, out, EncodersConfig(**weights), ALONE, start(ALONE)))


def test_killed_at_any_touch_of_a_file_it_ends_with_the_same_bytes(data, demo_assets, tmp_path):
    """At every eighth touch in turn, and killed once more at its second start."""
    assert not cache_in_child(data, tmp_path / "whole", demo_assets, None)
    whole = content(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in whole) == 3
    last_event = 1
    while cache_in_child(data, tmp_path / "out", demo_assets, last_event):
        cache_in_child(data, tmp_path / "out", demo_assets, 30 - last_event % 7)
        assert not cache_in_child(data, tmp_path / "out", demo_assets, None)
        assert content(tmp_path / "out") == whole, f"killed at event {last_event}"
        shutil.rmtree(tmp_path / "out")
        last_event += 8
    assert last_event > 40, "so few touches: the hook does not see the cache"
