"""Remote shards through a bounded cache, against a real HTTP server and fsspec's memory and file systems."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_server import serving

from proteingpt.data import shard_places
from proteingpt.data.shard_cache import Activity, choose_evicted
from proteingpt.data.shard_places import join, shown
from proteingpt.data.shards import BadSample, ShardCache, ShardError, ShardSet, write_shards
from proteingpt.protein import Protein, Sample, Turn


def sample(number: int, length: int = 40) -> Sample:
    backbone = np.random.default_rng(number).normal(size=(length, 3, 3)).astype(np.float32)
    protein = Protein(f"{number}abc", "A", "A" * length, backbone)
    return Sample(protein, f"About {number}.", (Turn("What?", str(number)),))


NUM, PER_SHARD = 12, 3


@pytest.fixture
def directory(tmp_path):
    """Four shards of three samples each, all of one size."""
    samples = {"train": map(sample, range(NUM)), "test": []}
    write_shards(tmp_path / "shards", samples, samples_per_shard=PER_SHARD, options={})
    return tmp_path / "shards"


@pytest.fixture
def remote(directory):
    with serving(directory) as (address, orders):
        yield address, orders


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(shard_places, "FIRST_WAIT_SECONDS", 0.01)


def shard_bytes(directory: Path) -> int:
    return (directory / "train-00000.tar").stat().st_size


def cached(cache: ShardCache) -> set[str]:
    return {path.stem for path in cache.directory.glob("*.tar")}


def assert_all_read(shards: ShardSet):
    for i in range(NUM):
        read = shards.read(i)
        np.testing.assert_array_equal(read.protein.backbone, sample(i).protein.backbone)
        assert (read.key, read.turns) == (sample(i).key, sample(i).turns)


def test_over_http_each_file_is_fetched_once_and_is_what_was_sent(remote, directory, tmp_path):
    address, orders = remote
    cache = ShardCache(tmp_path / "cache", 2**30)
    for _ in range(2):
        shards = ShardSet(address, "train", cache)
        assert shards.is_remote and shards.fingerprint == ShardSet(directory, "train").fingerprint
        assert_all_read(shards)
        shards.close()
    assert {name: count for name, count in orders.asked.items() if name.endswith(".tar")} == {
        f"train-0000{n}.tar": 1 for n in range(4)
    }
    for path in cache.directory.glob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    assert not list(cache.directory.glob("*.partial"))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_any_address_that_fsspec_knows(directory, tmp_path, kind):
    address = f"file://{directory}" if kind == "file" else f"memory://{tmp_path.name}"
    if kind == "memory":
        for path in directory.iterdir():
            with fsspec.open(f"{address}/{path.name}", "wb") as file:
                file.write(path.read_bytes())
    shards = ShardSet(address, "train", ShardCache(tmp_path / "cache", 2**30))
    assert_all_read(shards)
    with pytest.raises(ShardError, match="manifest.json could not be fetched"):
        ShardSet(f"{address}/elsewhere", "train", ShardCache(tmp_path / "cache", 2**30))


@pytest.mark.parametrize("address", ["s3://bucket/pdb", "nonsense://host/pdb"])
def test_a_file_system_that_is_not_installed_is_named(tmp_path, address):
    with pytest.raises(ShardError, match="s3fs|nonsense"):
        ShardSet(address, "train", ShardCache(tmp_path, 2**30))


def test_a_failing_server_is_asked_again_and_a_cut_body_is_not_taken_for_the_file(remote, tmp_path):
    address, orders = remote
    orders.failing = {"manifest.json": 2, "train-00000.tar": 2}
    orders.cut = {"train-00001.tar"}
    assert_all_read(ShardSet(address, "train", ShardCache(tmp_path / "cache", 2**30)))
    assert orders.asked["train-00000.tar"] == 3 and orders.asked["train-00001.tar"] == 2


def test_a_shard_that_never_comes_is_named_and_asked_for_no_more_than_a_few_times(remote, tmp_path):
    address, orders = remote
    orders.failing = {"train-00002.tar": 10**6}
    shards = ShardSet(address, "train", ShardCache(tmp_path / "cache", 2**30))
    for i in range(NUM):
        if i // PER_SHARD == 2:
            with pytest.raises(BadSample, match=rf"train-00002.tar, sample {i}abc_A, .*\(5 tries\): HTTP status 503"):
                shards.read(i)
        else:
            shards.read(i)
    assert orders.asked["train-00002.tar"] == shard_places.TRIES


def test_what_is_not_the_manifests_is_fetched_once_more_and_never_kept(remote, directory, tmp_path):
    address, orders = remote
    path = directory / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    cache = ShardCache(tmp_path / "cache", 2**30)
    shards = ShardSet(address, "train", cache)
    with pytest.raises(BadSample, match="train-00001.tar could not be fetched .*sha256 is not the manifest's"):
        shards.read(PER_SHARD)
    assert orders.asked["train-00001.tar"] == 2
    assert cached(cache) == set() and not list(cache.directory.glob("*.partial"))


def test_a_cached_shard_that_is_damaged_later_is_fetched_anew(remote, tmp_path):
    address, orders = remote
    cache = ShardCache(tmp_path / "cache", 2**30)
    ShardSet(address, "train", cache).read(0)
    (path,) = cache.directory.glob("*.tar")
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    assert_all_read(ShardSet(address, "train", cache))
    assert orders.asked["train-00000.tar"] == 2


def test_the_cache_keeps_to_its_bound_and_lets_the_oldest_go(remote, directory, tmp_path):
    address, orders = remote
    cache = ShardCache(tmp_path / "cache", int(2.5 * shard_bytes(directory)))
    shards = ShardSet(address, "train", cache)
    for i in (0, 3, 0, 6):  # shard 1 has been used longer ago than shard 0 when shard 2 comes
        shards._files.clear()
        time.sleep(0.01)
        shards.read(i)
        assert sum(path.stat().st_size for path in cache.directory.glob("*.tar*")) <= cache.max_bytes
    assert cached(cache) == {shards.shards[n]["sha256"] for n in (0, 2)}


def test_a_shard_larger_than_the_cache_is_refused_with_both_numbers(remote, directory, tmp_path):
    address, _ = remote
    cache = ShardCache(tmp_path / "cache", shard_bytes(directory) - 1)
    with pytest.raises(BadSample, match=f"has {shard_bytes(directory)} bytes, data.cache_gib holds {cache.max_bytes}"):
        ShardSet(address, "train", cache).read(0)


def wait_until(condition, seconds: float = 30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_expected_shards_are_fetched_ahead_in_their_order_as_far_as_there_is_room(remote, directory, tmp_path):
    address, orders = remote
    cache = ShardCache(tmp_path / "cache", int(3.5 * shard_bytes(directory)))
    shards = ShardSet(address, "train", cache)
    shards.expect([3, 1, 0, 2])
    wait_until(lambda: len(cached(cache)) == 3)
    asked = [name for name in orders.asked if name.endswith(".tar")]  # in the order of the first time
    assert asked == ["train-00003.tar", "train-00001.tar", "train-00000.tar"]
    shards.read(9)
    # What will be read soon is not thrown out for what comes last.
    assert cached(cache) == {shards.shards[n]["sha256"] for n in (3, 1, 0)}
    shards.expect([2, 0])  # 3 and 1 are not needed any more
    wait_until(lambda: shards.shards[2]["sha256"] in cached(cache))
    assert shards.shards[0]["sha256"] in cached(cache)
    shards.close()


def test_what_was_read_ahead_needs_no_server(remote, tmp_path):
    address, orders = remote
    cache = ShardCache(tmp_path / "cache", 2**30)
    shards = ShardSet(address, "train", cache)
    shards.expect(range(4))
    wait_until(lambda: len(cached(cache)) == 4)
    orders.failing = {f"train-0000{n}.tar": 10**6 for n in range(4)}
    assert_all_read(shards)
    shards.close()


READ_ALL = """
import sys
from proteingpt.data.shard_set import ShardSet
from proteingpt.data.shard_places import ShardCache
shards = ShardSet(sys.argv[1], "train", ShardCache(sys.argv[2], int(sys.argv[3])))
order = [int(n) for n in sys.argv[4].split(",")]
print("ready", flush=True)
sys.stdin.readline()
print(sum(len(shards.read(i).protein) for i in order))
"""


def test_processes_that_share_a_cache_fetch_nothing_twice(remote, tmp_path):
    """Two real processes, over the same shards at the same time, each download slow enough to meet the other's."""
    address, orders = remote
    orders.seconds_each = 0.15
    order = ",".join(map(str, range(0, NUM, PER_SHARD)))
    command = [sys.executable, "-c", READ_ALL, address, str(tmp_path / "cache"), str(2**30), order]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[3], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "160\n"
    assert [orders.asked[f"train-0000{n}.tar"] for n in range(4)] == [1] * 4


def test_what_a_killed_process_left_half_fetched_is_cleared_away(remote, tmp_path):
    address, _ = remote
    cache = ShardCache(tmp_path / "cache", 2**30)
    left = cache.directory / f"{'0' * 64}.tar.partial"
    left.write_bytes(bytes(1000))
    beside = cache.directory / ".tokens-align.partial"  # what others write here is theirs
    beside.write_bytes(b"")
    ShardSet(address, "train", cache).read(0)
    assert not left.exists() and beside.exists()


NAME = st.text("abcdef", min_size=1, max_size=3)


@given(
    st.lists(st.tuples(NAME, st.integers(1, 50)), unique_by=lambda file: file[0], max_size=8),
    st.integers(-20, 200),
    st.lists(NAME, unique=True, max_size=8),
    st.booleans(),
)
def test_room_is_made_from_what_is_needed_least_soon(files, excess, keep, needed):
    chosen, left = choose_evicted(files, excess, keep, needed)
    sizes = dict(files)
    if left > 0:
        freely = sum(size for name, size in files if needed or name not in keep)
        assert chosen == [] and freely < excess
        return
    assert sum(sizes[name] for name in chosen) >= excess
    assert not chosen or sum(sizes[name] for name in chosen[:-1]) < excess  # nothing more than needed
    free = [name for name, _ in files if name not in keep]
    kept = [name for name in reversed(keep) if name in sizes]
    assert chosen == (free + kept)[: len(chosen)]
    assert needed or not set(chosen) & set(keep)


@pytest.mark.parametrize(
    "address, url, text",
    [
        ("http://host/dir/", "http://host/dir/a.tar", "http://host/dir"),
        ("http://host/dir?sig=s3cret", "http://host/dir/a.tar?sig=s3cret", "http://host/dir"),
        ("ftp://me:s3cret@host/dir", "ftp://me:s3cret@host/dir/a.tar", "ftp://host/dir"),
    ],
)
def test_addresses_are_joined_before_their_query_and_shown_without_secrets(address, url, text):
    assert join(address, "a.tar") == url and shown(address) == text


# --- local shards


def read_bytes_of(shards: ShardSet, i: int) -> int:
    """Bytes that this process reads from files for one sample, as the kernel counts them."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    own = count()
    own = count() - own
    before = count()
    shards.read(i)
    return count() - before - own


def test_a_local_shard_is_read_whole_once_and_never_again_until_it_changes(directory, tmp_path):
    cache, size = ShardCache(tmp_path / "cache", 2**30), shard_bytes(directory)
    shards = ShardSet(directory, "train", cache)
    assert read_bytes_of(shards, 0) > size  # compared with its sha256
    assert read_bytes_of(shards, 1) < size / 2
    again = ShardSet(directory, "train", cache)
    assert read_bytes_of(again, 0) < size / 2  # another run knows it
    os.utime(directory / "train-00000.tar", ns=(1, 1))
    assert read_bytes_of(ShardSet(directory, "train", cache), 0) > size
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["manifest.json", *(f"train-0000{n}.{kind}" for n in range(4) for kind in ("tar", "index.jsonl"))]
    )


def test_a_damaged_local_shard_is_named_and_its_good_samples_are_read(directory, tmp_path, caplog):
    record = json.loads((directory / "train-00000.index.jsonl").read_text().splitlines()[1])
    content = bytearray((directory / "train-00000.tar").read_bytes())
    content[record["members"]["backbone.npy"][0] + 200] ^= 4
    (directory / "train-00000.tar").write_bytes(content)
    shards = ShardSet(directory, "train", ShardCache(tmp_path / "cache", 2**30))
    shards.read(0), shards.read(2)
    assert "train-00000.tar: its sha256 is not the manifest's" in caplog.text
    with pytest.raises(BadSample, match="sample 1abc_A, backbone.npy: wrong checksum") as raised:
        shards.read(1)
    assert (raised.value.key, raised.value.shard) == ("1abc_A", f"{directory}/train-00000.tar")


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="data.cache_dir .*file/cache"):
        ShardCache(tmp_path / "file" / "cache", 1)


def test_a_reader_says_what_it_is_at(remote, tmp_path):
    """Seen by a server that stops in the middle of a shard."""
    import threading

    address, orders = remote
    orders.stalled = {"train-00001.tar"}
    shards = ShardSet(address, "train", ShardCache(tmp_path / "cache", 2**30))
    assert shards.activity.text is None and isinstance(shards.activity, Activity)
    thread = threading.Thread(target=lambda: shards.read(3), daemon=True)
    thread.start()
    wait_until(lambda: "train-00001.tar, fetching it: 0.0 of 0.0 MB" in (shards.activity.text or ""))
    orders.stalled = set()
    orders.released.set()
    thread.join(timeout=60)
    assert shards.activity.text is None
