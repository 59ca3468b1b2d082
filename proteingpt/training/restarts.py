"""--max-restarts N: this command starts the ranks of one machine itself, and starts them again when one dies.

A loop of our own and not torch's elastic agent: DeepSpeed's launcher has no elastic training since 0.19 and ends a run
at the first failure, and torchrun --max-restarts needs a rendezvous that survives its ranks, which on gloo it did in 4
of 8 trials. Here every start is a fresh world on a fresh port, and what is known of the run lies in its directory
alone.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from proteingpt.training.signals import REQUEUE, Early

USER_ERROR = 1
LEAVE_SECONDS = 8.0  # for the others to notice that one is gone, and to say so
SAVE_SECONDS = 30.0
TICK_SECONDS = 0.1
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def main(argv: list[str]) -> int:
    """What launch/train.py does. The exit code: 0 finished, 1 the user's error, REQUEUE saved on a signal, else a
    fault."""
    try:
        argv, max_restarts, num_ranks = taken_out(argv)
        check_alone(max_restarts, num_ranks, os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    if max_restarts is None and num_ranks is None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told in one line, by us
        early = Early()
        from proteingpt.training.run import main as train  # seconds of imports that a supervisor does without

        return train(argv, early)
    command = [sys.executable, "-u", sys.argv[0], *argv]
    return supervise(lambda env: subprocess.Popen(command, env=env), num_ranks or count_devices(), max_restarts or 0)


def taken_out(argv: Sequence[str]) -> tuple[list[str], int | None, int | None]:
    """(the other arguments, --max-restarts, --ranks). ValueError where one is no count."""
    rest, found = [], {"--max-restarts": None, "--ranks": None}
    arguments = iter(argv)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in found:
            rest.append(argument)
            continue
        value = value or next(arguments, "")
        least = 1 if name == "--ranks" else 0
        if not value.isdecimal() or int(value) < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number >= {least}")
        found[name] = int(value)
    return rest, found["--max-restarts"], found["--ranks"]


def check_alone(max_restarts: int | None, num_ranks: int | None, env: Mapping[str, str]):
    outer = [name for name in LAUNCHERS if name in env]
    if outer and (max_restarts is not None or num_ranks is not None):
        raise ValueError(
            f"--max-restarts and --ranks are for python launch/train.py, which then starts the ranks itself; here a "
            f"launcher has started them ({outer[0]} is set): leave them out, or leave the launcher out"
        )


def count_devices() -> int:
    """GPUs of this machine, without loading torch; 1 where there is none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return max(1, len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d.strip()]))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return 1
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def supervise(start: Callable[[dict], subprocess.Popen], num_ranks: int, max_restarts: int) -> int:
    """Run the ranks to their end, from the last checkpoint again where one dies. start(environment) -> its process."""
    told: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: told.append(n)) for number in FORWARDED}
    try:
        for attempt in range(max_restarts + 1):
            port = free_port()
            ranks = [start(environment(rank, num_ranks, port)) for rank in range(num_ranks)]
            try:
                codes = until_the_end(ranks, told)
            finally:
                end(ranks)
            code = verdict(codes, told)
            if code in (0, USER_ERROR, REQUEUE) or told:
                return code
            left = max_restarts - attempt
            what = ", ".join(f"rank {rank} {said(code)}" for rank, code in enumerate(codes) if code)
            then = "starting again from the last checkpoint" if left else "no restart is left"
            print(f"{what}: {then} ({attempt + 1} of {max_restarts + 1} starts)", file=sys.stderr, flush=True)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in place.items()}}


def until_the_end(ranks: list[subprocess.Popen], told: list[int]) -> list[int | None]:
    """Exit codes in rank order, in the order of time where it matters: None for those that had to be ended since
    another had failed. Signals are passed on to all ranks, who then have SAVE_SECONDS."""
    deadline, passed_on = None, 0
    while any(rank.poll() is None for rank in ranks):
        for number in told[passed_on:]:
            passed_on += 1
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(number)
            deadline = deadline or time.monotonic() + SAVE_SECONDS
        codes = [rank.poll() for rank in ranks]
        if any(codes) and deadline is None:
            deadline = time.monotonic() + (SAVE_SECONDS if REQUEUE in codes else LEAVE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(TICK_SECONDS)
    return [rank.poll() for rank in ranks]


def end(ranks: list[subprocess.Popen]):
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()  # also a stopped one
        rank.wait()


def verdict(codes: Sequence[int | None], told: Sequence[int] = ()) -> int:
    """One exit code for all. told: signals that were passed on. A user's error decides, as any rank may find it; a
    saved stop where no rank failed otherwise (one that the signal itself ended had not even begun); else the first
    fault, a signal as in a shell."""
    if all(code == 0 for code in codes):
        return 0
    if USER_ERROR in codes:
        return USER_ERROR
    if all(code in (0, REQUEUE, *(-number for number in told)) for code in codes):
        return REQUEUE
    fault = next((code for code in codes if code not in (None, 0, REQUEUE)), 128 + signal.SIGKILL)
    return 128 - fault if fault < 0 else fault


def said(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
