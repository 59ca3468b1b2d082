"""What many tests share."""

import os
import signal

# A shell that starts the tests in the background leaves them, and every process they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: two cores are shared with other processes, and DeepSpeed must not look for a GPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
from ranks import World

from proteingpt.config import DemoConfig
from proteingpt.data.shards import ShardSet
from proteingpt.demo.assets import make_assets
from proteingpt.demo.llm import write_tiny_llm


@pytest.fixture(scope="session")
def demo_assets(tmp_path_factory):
    """The demo's shards (16 training, 4 test proteins), tiny encoders and tiny LLM."""
    directory = tmp_path_factory.mktemp("demo_assets")
    make_assets(DemoConfig(directory=str(directory), num_proteins=20, llm_width=32, llm_layers=2), seed=7)
    return directory


@pytest.fixture(scope="session")
def worlds():
    """worlds(n): a world of n ranks (tests/ranks.py), kept for the whole session."""
    kept = {}
    yield lambda num_ranks: kept.setdefault(num_ranks, World(num_ranks))
    for world in kept.values():
        world.kill()


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory, demo_assets):
    """A tiny LLM with what sharding may stumble over: tied embeddings, grouped queries and biases."""
    shards = ShardSet(demo_assets, "train")
    texts = [turn.question + turn.answer for i in range(len(shards)) for turn in shards.read_text(i)[1]]
    directory = tmp_path_factory.mktemp("qwen2")
    return write_tiny_llm(
        directory, sorted(texts), family="qwen2", seed=3, width=32, vocab_size=320, initializer_range=0.1
    )
