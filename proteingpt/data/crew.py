"""Who parses: this process, other processes, MPI ranks; and how the files are handed out to them.

Work is dealt out as it is done, in small batches, so that nobody waits for the one who got the ribosome.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, wait

from proteingpt.data.sources import Job

# A batch is small enough that little is lost with it and no process waits long for the last one, and large enough that
# its two files and its message cost nothing beside the parsing.
BATCH_FILES = 16
BATCH_BYTES = 2 << 20


def cut_batches(jobs: list[tuple[str, Job]]) -> list[list[tuple[str, Job]]]:
    """(key, job) pairs in batches of at most BATCH_FILES and BATCH_BYTES, but never none; the largest files first.

    Largest first, so that a ribosome is not what everyone waits for in the end.
    """
    by_size = sorted(((job.path.stat().st_size, key, job) for key, job in jobs), key=lambda item: (-item[0], item[1]))
    batches, num_bytes = [], 0
    for size, key, job in by_size:
        if not batches or len(batches[-1]) == BATCH_FILES or num_bytes + size > BATCH_BYTES:
            batches.append([])
            num_bytes = 0
        batches[-1].append((key, job))
        num_bytes += size
    return batches


class Crew:
    """Whoever parses: `executor` with so many processes elsewhere, and this process too if `here`."""

    def __init__(self, executor: Executor | None, num_remote: int, here: bool):
        self.executor, self.num_remote, self.here = executor, num_remote, here
        # Whoever calls may have children of its own; the pool starts its processes with the first batch.
        self.strangers = set(multiprocessing.active_children())
        self.processes: set = set()

    def run(self, call: Callable, batches: list, first: Callable | None = None) -> Iterator:
        """call(batch) of each batch, as they are done. The others get the first batches, this process the last ones:
        it has to come back to give out more. first: what this process does as soon as the others have work."""
        waiting, running = deque(batches), set()
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.num_remote:
                    running.add(self.executor.submit(call, waiting.popleft()))
                    self.processes |= set(multiprocessing.active_children()) - self.strangers
                if running and first is not None:
                    first()
                    first = None
                if self.here and waiting:
                    yield call(waiting.pop())
                done, running = wait(running, 0 if self.here and waiting else None, FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()

    def find_dead(self) -> list:
        """Processes that ended otherwise than by themselves or by the pool's own SIGTERM."""
        for process in self.processes:
            process.join(5)
        return [process for process in self.processes if process.exitcode not in (None, 0, -15)]
