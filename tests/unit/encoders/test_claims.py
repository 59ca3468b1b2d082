"""Claims: exclusive among processes that live, and free again when one dies, lets go or falls silent."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from proteingpt.encoders import claims
from proteingpt.encoders.claims import Claims, is_gone, machine, started

FORK = multiprocessing.get_context("fork")


def hold(directory: Path, pipe, elsewhere: bool):
    """Holds the claim `job` until the other end of the pipe is closed; here, or as if on another machine."""
    claims.BEAT_SECONDS = 0.05
    if elsewhere:
        claims.machine = lambda: "another machine"
    with Claims(directory).claim("job", lambda: 7) as claim:
        pipe.send(claim is not None)
        with contextlib.suppress(EOFError):
            pipe.recv()


def swarm(directory: Path):
    """Forty jobs, of which one that is done twice fails."""
    mine = Claims(directory / "claims")
    for number in range(40):
        with mine.claim(f"job-{number}") as claim:
            if claim and not (done := directory / f"job-{number}.done").exists():
                done.touch(exist_ok=False)


@pytest.fixture
def holder(tmp_path):
    """holder(elsewhere): a process that holds the claim; and what ends it in good order."""
    processes = []

    def start(elsewhere: bool = False):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(tmp_path / "claims", theirs, elsewhere))
        process.start()
        processes.append(process)
        assert ours.recv()

        def let_go():
            ours.send(None)
            process.join()

        return process, let_go

    yield start
    for process in processes:
        process.kill()
        process.join()


def is_taken(mine: Claims) -> bool:
    with mine.claim("job") as claim:
        return claim is None


def test_what_another_process_holds_is_refused_until_it_lets_go(holder, tmp_path):
    (process, let_go), mine = holder(), Claims(tmp_path / "claims")
    assert is_taken(mine) and is_taken(Claims(tmp_path / "claims"))
    owner = mine.owners()["job"]
    assert (owner["pid"], owner["host"], owner["done"]) == (process.pid, socket.gethostname(), 7)
    let_go()
    assert not is_taken(mine)
    assert not (tmp_path / "claims").exists(), "nothing is held, and something is left"


def test_one_that_was_killed_on_this_machine_is_overtaken_at_once(holder, tmp_path):
    (process, let_go), mine = holder(), Claims(tmp_path / "claims")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert mine.owners() == {}
    with mine.claim("job") as claim:
        assert claim.path.name == "job.1" and claim.is_ours and is_taken(Claims(tmp_path / "claims"))


def test_one_of_another_machine_is_overtaken_when_it_has_been_silent_for_the_lease(holder, tmp_path, monkeypatch):
    """Its process is stopped, as a machine that hangs; awake again it learns that the claim is no longer its own."""
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.5)
    (process, let_go), mine = holder(elsewhere=True), Claims(tmp_path / "claims")
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # longer than the lease, but it beats
        assert is_taken(mine)
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    while is_taken(mine):
        assert time.monotonic() - began < 20
        time.sleep(0.02)
    assert time.monotonic() - began >= 0.4
    with mine.claim("job") as claim:
        os.kill(process.pid, signal.SIGCONT)
        let_go()
        assert claim.is_ours, "the one that woke up has taken it away"


def test_many_processes_at_once_do_each_job_once(tmp_path):
    """Three that are started together; a job that is done twice would fail."""
    several = [FORK.Process(target=swarm, args=(tmp_path,)) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.done"))) == 40 and not (tmp_path / "claims").exists()


def test_a_process_id_that_is_used_again_is_another_process():
    mine = {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}
    assert not is_gone(mine) and is_gone(mine | {"started": "1"})
    assert not is_gone(mine | {"machine": "another", "started": "1"}), "of another machine nothing is known"
    assert not is_gone({}), "one that is being written"
    assert started(2**22 + 1) is None


def test_waiting_for_a_turn(holder, tmp_path):
    (process, let_go), mine = holder(), Claims(tmp_path / "claims")
    threading.Timer(0.3, let_go).start()
    began = time.monotonic()
    with mine.turn("job"):
        assert time.monotonic() - began >= 0.2 and is_taken(Claims(tmp_path / "claims"))
