"""Worlds of ranks for tests: real processes, joined by gloo as under the deepspeed launcher, kept for many calls.

Forked from a server that has imported torch, deepspeed and transformers once, so that a two-rank test costs a second
and not thirty. A world in which anything failed or hung is killed, and the next call starts another.
"""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from functools import lru_cache
from multiprocessing.connection import wait

PRELOADED = ["torch", "deepspeed", "transformers", "proteingpt.training.run"]
GRACE_SECONDS = 5  # for the other ranks' word, once one has failed


class RankError(AssertionError):
    """A rank raised, died or hung. The message holds the tracebacks of those that raised."""


class World:
    """`world(function, *args)` runs function(rank, device, *args) on every rank: the values, in rank order.

    function: at the top level of a plain file, which the ranks load by its path; pytest's names for test modules mean
    nothing to them. Arguments and values are pickled.
    """

    def __init__(self, num_ranks: int, timeout_seconds: float = 120):
        self.num_ranks, self.timeout_seconds = num_ranks, timeout_seconds
        self.processes, self.pipes = [], []

    def __call__(self, function, *args) -> list:
        if not self.processes:
            self.start()
        task = pickle.dumps((function.__code__.co_filename, function.__name__, args))
        for pipe in self.pipes:
            pipe.send_bytes(task)
        values, errors = self.collect()
        if errors or len(values) < self.num_ranks:
            self.kill()
            silent = sorted(set(range(self.num_ranks)) - set(values) - set(errors))
            said = "".join(f"\n--- rank {rank} of {self.num_ranks}\n{error}" for rank, error in sorted(errors.items()))
            raise RankError(f"{function.__name__}: ranks {sorted(errors)} failed, {silent} gave no answer{said}")
        return [values[rank] for rank in range(self.num_ranks)]

    def start(self):
        context = server()
        port = free_port()
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            place = (rank, self.num_ranks, port, self.timeout_seconds)
            process = context.Process(target=serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def collect(self) -> tuple[dict, dict]:
        """({rank: value}, {rank: traceback}) of those that answer in time."""
        values, errors = {}, {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + self.timeout_seconds
        while waiting and (ready := wait(list(waiting), max(0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error, value = "the process is gone", None
                if error is None:
                    values[rank] = value
                else:
                    errors[rank] = error
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return values, errors

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


@lru_cache
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------------- on each rank


def serve(pipe, place: tuple[int, int, int, float]):
    number, num_ranks, port, timeout_seconds = place
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    import torch
    import transformers

    from proteingpt.distributed import detect, start, stop

    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's, of torch names that are to change
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rank = detect(os.environ)
    device = start(rank, timeout_seconds)
    while True:
        try:
            file, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            break
        faulthandler.dump_traceback_later(timeout_seconds - 1)  # says where it hangs, if it does
        try:
            answer = (None, getattr(load(file), name)(rank, device, *args))
        except BaseException:  # told to the test, whatever it is
            answer = (traceback.format_exc(), None)
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(pickle.dumps(answer))
    stop()


@lru_cache
def load(file: str):
    name = f"on_rank_{os.path.splitext(os.path.basename(file))[0]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
