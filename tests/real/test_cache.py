"""The published embeddings, real output of ESM-IF1, become a cache; training on real abstracts and questions runs on
it."""

import json
from pathlib import Path

import pytest
import torch
from commands import execute, workplace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteingpt.config import EncodersConfig
from proteingpt.data.shards import ShardSet
from proteingpt.encoders.cache import CachedEncoders

REAL = Path(__file__).parents[3] / "shared" / "data" / "proteinchat"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not REAL.is_dir(), reason=f"the published data in {REAL} are absent"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """184 proteins of which only the structure's rows are known, so no ESM-2, and no weights on the disk at all."""
    folder = workplace(tmp_path_factory.mktemp("published"))
    built = execute(
        f"python launch/build_shards.py --embeddings {REAL}/pt --qa {REAL}/qa.json --abstracts {REAL}/abstract.json "
        "--out shards/published",
        folder,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    cached = execute(
        "python launch/cache_embeddings.py --data shards/published --out shards/published-esm --from-published "
        f"{REAL}/pt",
        folder,
    )
    assert cached.returncode == 0, cached.stderr[-2000:]
    process = execute(
        "python launch/train.py --ds_config ds_configs/zero2.json --data shards/published --embeddings "
        "shards/published-esm --encoders.esm2 none --encoders.esm_if1 esm_if1_gvp4_t16_142M_UR50 --encoders.dtype "
        "bfloat16 --output runs/published --demo.num_proteins 20 --demo.llm_width 48 --demo.llm_layers 1 "
        "--data.max_residues 220 --align.max_steps 12 --align.samples_per_step 8 --align.warmup_steps 2 "
        "--instruct.max_steps 16 --instruct.samples_per_step 32 --instruct.warmup_steps 2 --evaluation.every_steps 6 "
        "--evaluation.num_proteins 6 --evaluation.questions_per_protein 6 --evaluation.max_new_tokens 6",
        folder,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, cached, process


def test_every_published_embedding_is_in_the_cache_to_the_bit(trained):
    folder, cached, _ = trained
    assert "184 proteins, " in cached.stdout and "0 left out" in cached.stdout
    config = EncodersConfig(esm2="none", esm_if1="esm_if1_gvp4_t16_142M_UR50")
    encoders = CachedEncoders(folder / "shards/published-esm", config, "cpu")
    for split in ("train", "test"):
        shards = ShardSet(folder / "shards/published", split)
        for number in range(0, len(shards), 9):
            protein = shards.read_protein(number)
            published = torch.load(REAL / "pt" / f"{protein.id}.pt", map_location="cpu", weights_only=True)
            (structure,), _ = encoders.encode([protein])
            assert torch.equal(structure, published.detach()[:, 0].bfloat16())


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_held_out_loss_falls_on_real_abstracts_and_questions(trained, stage):
    folder, _, _ = trained
    events = EventAccumulator(str(folder / "runs/published/tensorboard" / stage))
    events.Reload()
    held_out = [event.value for event in events.Scalars("learning/held_out_loss")]
    assert len(held_out) >= 2 and held_out[-1] < held_out[0]


def test_the_report_stands_beside_the_blind_baseline_and_the_model_says_of_which_rows_it_is(trained):
    folder, _, process = trained
    report = json.loads((folder / "runs/published/report.json").read_text())
    assert report["num_questions"] > 0 and f"blind baseline         {report['blind_accuracy']:.1%}" in process.stdout
    model = json.loads((folder / "runs/published/model/model.json").read_text())
    assert (model["esm2"], model["sequence_width"], model["structure_width"]) == ("none", 0, 512)
    assert model["esm_if1_fingerprint"] == ""  # published without the checksum of the weights
