"""Loading an LLM takes no copy of it beside the one that trains: none of the host's under ZeRO 3, where each rank keeps
its share, and elsewhere the pages of the file, which all ranks of a host have mapped together."""

import ctypes
import threading
import time
from pathlib import Path

import pytest
import torch

from proteingpt.config import ModelConfig
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.model import assemble
from proteingpt.training.engine import gathered, sharded_loading

pytestmark = pytest.mark.nightly

MIB = 2**20
LIBC = ctypes.CDLL("libc.so.6")


def private_bytes() -> int:
    """Of this process alone: neither a file's pages nor shared ones, nor what was freed and glibc has kept."""
    LIBC.malloc_trim(0)
    line = next(
        line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:")
    )
    return int(line.split()[1]) * 1024


def load_on_rank(rank, device, directories: list[str], stage: int) -> list[int]:
    """[grown by, grown at most by] of the last of `directories`; those before import what loading imports."""
    for directory in directories:
        before, most, done = private_bytes(), [0], threading.Event()

        def watch():
            while not done.is_set():
                most[0] = max(most[0], private_bytes())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with sharded_loading({"zero_optimization": {"stage": stage}}):
            config = ModelConfig(llm=directory, train="projector")
            model = assemble.build_model(config, 8, 8, torch.float32, 1, device, gathered)
        done.set()
        watcher.join()
        after = private_bytes()
        del model
    return [after - before, max(most[0], after) - before]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A tiny LLM, and one of 202 MiB."""
    sizes = {"tiny": (32, 2), "large": (1024, 5)}
    made = [
        write_tiny_llm(tmp_path_factory.mktemp(name), ["words"], width=width, num_layers=num_layers, vocab_size=280)
        for name, (width, num_layers) in sizes.items()
    ]
    assert 195 * MIB < (made[1] / "model.safetensors").stat().st_size < 210 * MIB
    return [str(directory) for directory in made]


@pytest.mark.parametrize("stage, share", [(3, 0.5), (2, 0.0)])
def test_two_ranks_hold_no_more_than_their_share(worlds, directories, stage, share):
    """In units of the whole LLM; what is added is for tensors on their way and what allocators round up."""
    whole = Path(directories[1], "model.safetensors").stat().st_size
    for grown, most in worlds(2)(load_on_rank, directories, stage):
        assert grown < (share + 0.15) * whole and most < (share + 0.2) * whole
