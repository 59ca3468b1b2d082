"""Training from cached rows is training with live encoders, to the bit; and a cache that does not fit is refused.

Every run is a whole one on two ranks, both stages, by training/run.py; what is compared is the exported weights.
"""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import webdataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ranks import RankError

from proteingpt.data.shards import ShardSet, write_shards

DEMO = ["--demo.num_proteins", "20", "--demo.llm_width", "32", "--demo.llm_layers", "2", "--seed", "7"]
SHORT = [
    "--align.max_steps", "2", "--instruct.max_steps", "3", "--evaluation.num_proteins", "2",
    "--evaluation.questions_per_protein", "2", "--evaluation.max_new_tokens", "4",
]  # fmt: skip
WEIGHTS = ("esm2_demo.pt", "esm_if1_demo.pt")
DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2.json"


def cache_on_rank(rank, device, data: str, out: str, weights: str, changes: dict, options: dict):
    import torch

    from proteingpt.config import EncodersConfig
    from proteingpt.encoders.cache_run import cache_embeddings

    torch.set_num_threads(1)
    config = {"esm2": f"{weights}/esm2_demo.pt", "esm_if1": f"{weights}/esm_if1_demo.pt", "dtype": "float32", **changes}
    return cache_embeddings(data, out, EncodersConfig(**config), device, **options)


def train_on_rank(rank, device, argv: list[str]) -> list[str]:
    """What the log said."""
    import logging

    from proteingpt.config import parse_command
    from proteingpt.training.run import run
    from proteingpt.training.signals import StopRequest
    from proteingpt.training.watchdog import Watchdog

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("proteingpt")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    asked = parse_command(argv)
    watchdog = Watchdog(rank, StopRequest(), asked.config.devices.hang_seconds)
    try:
        run(asked, rank, device, watchdog)
    finally:
        watchdog.close()
        log.removeHandler(handler)
    return said


def command(assets: Path, output: Path, *more: str) -> list[str]:
    where = ["--ds_config", str(DS_CONFIG), "--demo.directory", str(assets), "--output", str(output)]
    return [*where, *DEMO, *SHORT, *more]


def weights(output: Path) -> dict:
    files = sorted((output / "model").rglob("*.safetensors"))
    return {f"{file.name}:{name}": value for file in files for name, value in safetensors.torch.load_file(file).items()}


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def assets(demo_assets, tmp_path_factory):
    """A copy without the encoders' weights, with the tokens' indexes of its own."""
    directory = tmp_path_factory.mktemp("cache") / "assets"
    shutil.copytree(demo_assets, directory)
    for name in WEIGHTS:
        (directory / name).unlink()
    made = json.loads((directory / "demo.json").read_text())
    (directory / "demo.json").write_text(json.dumps(made | {"directory": str(directory)}))  # or all would be made anew
    yield directory
    assert not any((directory / name).exists() for name in WEIGHTS)


@pytest.fixture(scope="module")
def cache(demo_assets, worlds, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached") / "esm"
    first, second = worlds(2)(cache_on_rank, str(demo_assets), str(out), str(demo_assets), {}, {})
    assert first == second and first["left_out"] == {}
    return out


@pytest.fixture(scope="module")
def live(demo_assets, worlds, tmp_path_factory):
    output = tmp_path_factory.mktemp("live") / "run"
    worlds(2)(train_on_rank, command(demo_assets, output))
    return output


def test_one_rank_and_two_write_the_same_bytes_and_any_reader_reads_them(demo_assets, cache, worlds, tmp_path):
    worlds(1)(cache_on_rank, str(demo_assets), str(tmp_path / "one"), str(demo_assets), {}, {})
    assert content(tmp_path / "one") == content(cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["encoders"]["sequence"]["layer"] == 2 and manifest["dtype"] == "float32"
    samples = list(webdataset.WebDataset(str(cache / "train-00000.tar"), shardshuffle=False))
    data = list(webdataset.WebDataset(str(demo_assets / "train-00000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [s["__key__"] for s in data]
    for sample, of_data in zip(samples, data):
        rows = safetensors.torch.load(sample["safetensors"])
        assert {len(r) for r in rows.values()} == {len(of_data["sequence.txt"]) + 2}


def test_without_any_encoder_on_the_disk_the_weights_learned_are_the_same_to_the_bit(
    assets, cache, live, worlds, tmp_path
):
    worlds(2)(train_on_rank, command(assets, tmp_path / "run", "--embeddings", str(cache)))
    learned, wanted = weights(tmp_path / "run"), weights(live)
    assert learned.keys() == wanted.keys() and all((learned[name] == wanted[name]).all() for name in wanted)
    reports = [json.loads((run / "report.json").read_text()) for run in (tmp_path / "run", live)]
    assert reports[0]["loss"] == reports[1]["loss"]
    models = [json.loads((run / "model" / "model.json").read_text()) for run in (tmp_path / "run", live)]
    for name in ("esm2_fingerprint", "esm_if1_fingerprint", "structure_width", "sequence_width", "encoder_dtype"):
        assert models[0][name] == models[1][name], name


def test_in_bf16_too_the_losses_and_the_weights_learned_are_the_same_to_the_bit(demo_assets, assets, worlds, tmp_path):
    """As real runs are: encoders and cache in bf16."""
    shards, data = ShardSet(demo_assets, "train"), tmp_path / "data"
    samples = [shards.read(number) for number in range(5)]
    write_shards(data, {"train": samples[:4], "test": samples[4:]}, samples_per_shard=2, options={})
    worlds(1)(cache_on_rank, str(data), str(tmp_path / "esm"), str(demo_assets), {"dtype": "bfloat16"}, {})
    half = ("--data", str(data), "--encoders.dtype", "bfloat16", "--instruct.max_steps", "1")
    worlds(1)(train_on_rank, command(demo_assets, tmp_path / "live", *half))
    worlds(1)(train_on_rank, command(assets, tmp_path / "cached", "--embeddings", str(tmp_path / "esm"), *half))
    losses = [loss_curve(tmp_path / run) for run in ("cached", "live")]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    learned, wanted = weights(tmp_path / "cached"), weights(tmp_path / "live")
    assert learned.keys() == wanted.keys() and all((learned[name] == wanted[name]).all() for name in wanted)
    models = [json.loads((tmp_path / run / "model" / "model.json").read_text()) for run in ("cached", "live")]
    assert [model["encoder_dtype"] for model in models] == ["bfloat16"] * 2


def loss_curve(run: Path) -> list[float]:
    """Of both stages, each step as it is in TensorBoard."""
    found = []
    for stage in ("align", "instruct"):
        events = EventAccumulator(str(run / "tensorboard" / stage))
        events.Reload()
        found += [event.value for event in events.Scalars("learning/loss")]
    return found


def damage(cache: Path, copy: Path) -> str:
    """A copy of the cache with a flipped byte in the rows of one training protein; its key."""
    shutil.copytree(cache, copy)
    record = json.loads((copy / "train-00000.index.jsonl").read_text().splitlines()[3])
    offset, size, _ = record["members"]["safetensors"]
    with open(copy / "train-00000.tar", "r+b") as file:
        file.seek(offset + size - 5)
        byte = file.read(1)
        file.seek(offset + size - 5)
        file.write(bytes([byte[0] ^ 1]))
    return record["key"]


def test_a_broken_entry_is_computed_anew_where_the_encoders_are_at_hand(demo_assets, cache, live, worlds, tmp_path):
    key = damage(cache, tmp_path / "damaged")
    argv = command(demo_assets, tmp_path / "run", "--embeddings", str(tmp_path / "damaged"))
    said = [line for lines in worlds(2)(train_on_rank, argv) for line in lines]
    named = [line for line in said if f"sample {key}: wrong checksum: computed anew" in line]
    assert 1 <= len(named) <= 2 * 2  # once for each rank and stage at most
    learned, wanted = weights(tmp_path / "run"), weights(live)
    assert all((learned[name] == wanted[name]).all() for name in wanted)


def test_a_broken_entry_is_named_and_set_aside_where_they_are_not(assets, cache, worlds, tmp_path):
    key = damage(cache, tmp_path / "damaged")
    worlds(2)(
        train_on_rank,
        command(assets, tmp_path / "run", "--embeddings", str(tmp_path / "damaged"), "--data.max_bad_share", "1"),
    )
    assert (tmp_path / "run" / "report.json").is_file()
    lines = [
        json.loads(line)
        for file in (tmp_path / "run").glob("set_aside-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert {line["key"] for line in lines} == {key} and "wrong checksum" in lines[0]["reason"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--encoders.esm2", "{other}"], "encoders.esm2: the weights .* have sha256 .*, the cache's"),
        (["--data", "{others}"], "10 of 30 samples are not in it .demo00020_A"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_with_what_differs(
    assets, cache, worlds, tmp_path, other_files, more, said
):
    more = [word.format(**other_files) for word in more]
    argv = command(assets, tmp_path / "run", "--embeddings", str(cache), *more)
    with pytest.raises(RankError, match=said):
        worlds(1)(train_on_rank, argv)


@pytest.fixture(scope="module")
def other_files(tmp_path_factory):
    """Another ESM-2, and the shards of other proteins."""
    from proteingpt.config import DemoConfig
    from proteingpt.demo.assets import make_assets
    from proteingpt.demo.encoders import write_tiny_esm2

    directory = tmp_path_factory.mktemp("others")
    make_assets(DemoConfig(directory=str(directory / "shards"), num_proteins=30, llm_width=16, llm_layers=1), seed=8)
    return {"other": str(write_tiny_esm2(directory / "esm2_other.pt", seed=5)), "others": str(directory / "shards")}
