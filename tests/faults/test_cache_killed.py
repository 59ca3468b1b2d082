"""An embedding cache that is killed, stopped, joined by others or left without disk, for real, ends with the bytes of
one that nothing happened to.

Processes are forked from this one, and stop, die or fill the disk at a chosen touch of a file.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from killing import content, killed_at

from proteingpt.config import EncodersConfig
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.distributed import Rank, start
from proteingpt.encoders import cache_command, cache_run, claims
from proteingpt.encoders.cache_run import all_jobs, cache_embeddings, open_splits

ALONE = Rank(0, 1, 0, "127.0.0.1", 0, "none")


@pytest.fixture(scope="module")
def data(demo_assets, tmp_path_factory):
    """Six proteins in three shards."""
    directory = tmp_path_factory.mktemp("data")
    shards = ShardSet(demo_assets, "train")
    samples = [shards.read(number) for number in range(6)]
    write_shards(directory, {"train": samples[:4], "test": samples[4:]}, samples_per_shard=2, options={})
    return directory


@pytest.fixture(scope="module")
def weights(demo_assets):
    return {"esm2": f"{demo_assets}/esm2_demo.pt", "esm_if1": f"{demo_assets}/esm_if1_demo.pt"}


@pytest.fixture(scope="module")
def whole(data, weights, tmp_path_factory):
    """What a run writes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert not cache_in_child(data, out, weights, None)
    assert sum(name.endswith(".tar") for name in content(out)) == 3
    return content(out)


def cache_in_child(data: Path, out: Path, weights: dict, last_event: int | None) -> bool:
    return killed_at(last_event, out, lambda: cache_embeddings(data, out, EncodersConfig(**weights), start(ALONE)))


def test_killed_at_any_touch_of_a_file_it_ends_with_the_same_bytes(data, weights, whole, tmp_path):
    """At every eighth touch in turn, and killed once more at its second start."""
    last_event = 1
    while cache_in_child(data, tmp_path / "out", weights, last_event):
        cache_in_child(data, tmp_path / "out", weights, 30 - last_event % 7)
        assert not cache_in_child(data, tmp_path / "out", weights, None)
        assert content(tmp_path / "out") == whole, f"killed at event {last_event}"
        shutil.rmtree(tmp_path / "out")
        last_event += 8
    assert last_event > 40, "so few touches: the hook does not see the cache"


# ------------------------------------------------------------------------ processes that were not started together


@pytest.fixture
def helper(data, weights, tmp_path):
    """helper(...): a process of its own that makes the cache `out`, and writes what it does to `log`; its id."""
    children = []

    def start(**options) -> int:
        children.append(begin_helper(data, tmp_path / "out", weights, tmp_path / "log", **options))
        return children[-1]

    yield start
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):  # it has ended well
            pass


@pytest.fixture(scope="module")
def largest(data):
    """The shard that is taken first."""
    return all_jobs(open_splits(data), {"structure": 64, "sequence": 64}, "bfloat16")[0].name


def begin_helper(data: Path, out: Path, weights: dict, log: Path, *, stop_in="", machine="", lease: float = 60) -> int:
    """It stops itself before the tar of the shard `stop_in` is written, and can be as if on another machine."""
    child = os.fork()
    if child:
        return child
    status, stopped = 1, False

    def stop(event: str, arguments: tuple) -> None:
        nonlocal stopped
        opened = str(arguments[0]) if event == "open" else ""
        if stop_in and not stopped and f"{stop_in}." in opened and ".tar.partial" in opened:
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)

    def logged(function, what):
        def call(*arguments):
            with open(log, "a") as file:
                file.write(f"{os.getpid()} {what(arguments)}\n")
            return function(*arguments)

        return call

    try:
        claims.LEASE_SECONDS, claims.BEAT_SECONDS = lease, 0.05
        if machine:
            claims.machine = lambda: machine
        sys.addaudithook(stop)
        cache_run.write_shard = logged(cache_run.write_shard, lambda arguments: arguments[1].name)
        cache_run.finish = logged(cache_run.finish, lambda arguments: "manifest")
        cache_embeddings(data, out, EncodersConfig(**weights), start(ALONE))
        status = 0
    finally:
        os._exit(status)


def is_stopped(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def done_by(log: Path) -> dict[str, list[int]]:
    """{what: the ids of those who began it}"""
    found: dict[str, list[int]] = {}
    for line in log.read_text().splitlines():
        child, what = line.split()
        found.setdefault(what, []).append(int(child))
    return found


def assert_ends_well(child: int) -> None:
    assert os.waitpid(child, 0)[1] == 0


def test_processes_started_one_after_the_other_share_the_shards_and_one_finishes(helper, largest, whole, tmp_path):
    """The first stands still in a shard: the second does the others and waits for it."""
    log, out = tmp_path / "log", tmp_path / "out"
    first = helper(stop_in=largest)
    wait_for(lambda: is_stopped(first))
    second = helper()
    wait_for(lambda: sum(path.suffix != ".making" for path in (out / ".work").glob("t*-0*")) == 2)
    assert os.waitpid(second, os.WNOHANG) == (0, 0) and not (out / "manifest.json").exists()
    os.kill(first, signal.SIGCONT)
    assert_ends_well(first)
    assert_ends_well(second)
    found = done_by(log)
    assert found.keys() == {"train-00000", "train-00001", "test-00000", "manifest"} and found[largest] == [first]
    assert all(len(by) == 1 for by in found.values()) and content(out) == whole
    assert all(by == [second] for what, by in found.items() if what not in (largest, "manifest"))
    late = helper()
    assert_ends_well(late)
    assert done_by(log) == found, "a late one has worked on what was finished"


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_shard_of_one_that_dies_is_taken_over(helper, largest, whole, tmp_path, where):
    """On the same machine at once; of another machine when it has been silent for the lease."""
    log, out = tmp_path / "log", tmp_path / "out"
    first = helper(stop_in=largest, machine="" if where == "here" else where)
    wait_for(lambda: is_stopped(first))
    second = helper(lease=60 if where == "here" else 1)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert_ends_well(second)
    assert done_by(log)[largest] == [first, second] and done_by(log)["manifest"] == [second]
    assert content(out) == whole


def test_one_that_only_slept_does_no_harm_to_the_one_that_took_over(helper, largest, whole, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    first = helper(stop_in=largest, machine="elsewhere")
    wait_for(lambda: is_stopped(first))
    assert_ends_well(helper(lease=1))
    assert content(out) == whole
    os.kill(first, signal.SIGCONT)
    assert_ends_well(first)
    assert content(out) == whole and len(done_by(log)["manifest"]) == 1


# ------------------------------------------------------------------------------------------ a full disk, a signal


@pytest.fixture
def small_disk(disk_of):
    """A folder of 4 MB."""
    return disk_of("4m")


def command_in_child(options: argparse.Namespace, said: Path, at: int | None = None, then=None) -> int:
    """The command's exit status. Before it writes its tar number `at`, then() befalls it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    num_tars, status = 0, 99

    def count(event: str, arguments: tuple) -> None:
        nonlocal num_tars
        if event == "open" and ".tar.partial" in str(arguments[0]):
            num_tars += 1
            if num_tars == at:
                then()

    try:
        sys.addaudithook(count)
        sys.stderr = sys.stdout = open(said, "w")
        status = cache_command.main(options)
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.stderr.flush()
        os._exit(status)


def options_of(data: Path, out: Path, weights: dict) -> argparse.Namespace:
    return argparse.Namespace(
        data=str(data), out=str(out), weights_dir=".", dtype="bfloat16", backend="fast", esm2_layer=None,
        from_published=None, estimate=False, together=False, overwrite=False, **weights,
    )  # fmt: skip


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(data, weights, whole, small_disk, tmp_path):
    options, fill = options_of(data, small_disk / "out", weights), f"cat /dev/zero > {small_disk}/ballast 2>/dev/null"
    assert command_in_child(options, tmp_path / "said", 2, lambda: os.system(fill)) == 1
    said = (tmp_path / "said").read_text()
    assert re.search(r"error: while writing .*/out: .*No space left on device.*same command goes on", said)
    assert "Traceback" not in said
    kept = [path.name for path in (small_disk / "out/.work").iterdir() if path.is_dir()]
    assert len(kept) == 1 and ".making" not in kept[0] and not (small_disk / "out/.claims").exists()
    (small_disk / "ballast").unlink()
    assert command_in_child(options, tmp_path / "said") == 0
    assert content(small_disk / "out") == whole
    assert " are there already" in (tmp_path / "said").read_text()


def test_one_that_is_told_to_end_lets_go_of_its_shard_at_once(data, weights, whole, tmp_path):
    """So that a process on another machine need not wait for the lease."""
    options, out = options_of(data, tmp_path / "out", weights), tmp_path / "out"
    assert command_in_child(options, tmp_path / "said", 2, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert not (out / ".claims").exists() and not list(out.glob(".work/*.making"))
    assert len([path for path in (out / ".work").iterdir() if path.is_dir()]) == 1
    assert command_in_child(options, tmp_path / "said") == 0 and content(out) == whole
