"""Ranks of launch/train.py forked from a server that has imported torch, deepspeed and transformers once: real
processes with process ids of their own, which start in a second instead of fifteen. For CPUs: a GPU's state does not
fork."""

import multiprocessing
import os
import signal
import sys
from functools import lru_cache
from pathlib import Path

PRELOADED = ["torch", "deepspeed", "transformers", "proteingpt.training.run"]


@lru_cache
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class ForkedRank:
    """What training.restarts asks of a process. log: a file to which it appends what it writes."""

    def __init__(self, argv: list[str], env: dict[str, str], directory: Path, log: Path):
        self.process = server().Process(target=run_rank, args=(argv, env, str(directory), str(log)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run_rank(argv: list[str], env: dict[str, str], directory: str, log: str):
    os.chdir(directory)
    os.environ.update(env, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    from proteingpt.training.run import main

    code = main(argv)
    sys.stdout.flush()
    os._exit(code)  # the exit code alone is asked for
