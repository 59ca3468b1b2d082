"""Real structures, from files to a report: built, then both stages trained on two ranks with the tiny encoders."""

import json
import shutil
from pathlib import Path

import pytest
from commands import execute, workplace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STRUCTURES = Path(__file__).parents[3] / "shared" / "data" / "pdb"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not STRUCTURES.is_dir(), reason="../shared/data is absent: no real structures to train on"),
]

NUM_FILES = 48


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("real"))
    (folder / "structures").mkdir()
    small = sorted((p for p in STRUCTURES.iterdir() if p.suffix == ".gz"), key=lambda p: (p.stat().st_size, p.name))
    for path in small[:: len(small) // (2 * NUM_FILES)][:NUM_FILES]:
        shutil.copy(path, folder / "structures")
    built = execute("python launch/build_shards.py --structures structures --out shards/real", folder)
    assert built.returncode == 0, built.stderr
    process = execute(
        "torchrun --standalone --nproc-per-node 2 launch/train.py --ds_config ds_configs/zero2.json --data shards/real "
        "--output runs/real --demo.num_proteins 20 --align.epochs 6 --align.samples_per_step 4 "
        "--instruct.epochs 4 --instruct.samples_per_step 32",
        folder,
        timeout=400,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, built, process


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_loss_falls_on_real_proteins(trained, stage):
    folder, _, _ = trained
    events = EventAccumulator(str(folder / "runs/real/tensorboard" / stage))
    events.Reload()
    losses = [event.value for event in events.Scalars("learning/loss")]
    fifth = len(losses) // 5
    assert sum(losses[-fifth:]) / fifth < 0.6 * sum(losses[:fifth]) / fifth


def test_the_held_out_report_is_printed_with_the_blind_baseline(trained):
    folder, _, process = trained
    report = json.loads((folder / "runs/real/report.json").read_text())
    assert report["ranks"] == 2 and report["num_questions"] > 0
    assert f"{report['accuracy']:.1%} of {report['num_questions']} held-out questions" in process.stdout
    assert f"blind baseline         {report['blind_accuracy']:.1%}" in process.stdout


def test_every_file_is_a_sample_or_a_named_skip(trained):
    folder, _, _ = trained
    manifest = json.loads((folder / "shards/real/manifest.json").read_text())
    num_samples = sum(total["num_samples"] for total in manifest["totals"].values())
    skipped = (folder / "shards/real/skipped.tsv").read_text().splitlines()[1:]
    assert num_samples + len(skipped) == len(list((folder / "structures").iterdir()))


def test_the_model_answers_about_a_file_it_has_not_seen_in_training(trained):
    folder, _, _ = trained
    asked = execute(
        f"python launch/chat.py --model runs/real/model --structure {STRUCTURES}/1crn.cif.gz "
        '--question "Is this protein determined by experimental or computational methods?"',
        folder,
    )
    assert asked.returncode == 0 and asked.stdout.strip()
