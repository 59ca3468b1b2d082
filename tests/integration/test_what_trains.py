"""Adapters behind a resampler, from the command to an answer, sharded over two ranks."""

import pytest
import json

from commands import execute, workplace

pytestmark = pytest.mark.nightly

COMMAND = (
    "torchrun --standalone --nproc-per-node 2 launch/train.py --ds_config ds_configs/zero3.json --demo.num_proteins 20 "
    "--evaluation.num_proteins 4 --align.max_steps 2 --instruct.samples_per_step 16 --instruct.max_steps 3 "
    "--model.train lora --model.lora.rank 4 --model.projector resampler --model.projector_tokens 6 "
    "--instruct.llm_lr_factor 0.5"
)


def test_both_stages_run_and_the_exported_model_answers(tmp_path):
    folder = workplace(tmp_path)
    done = execute(COMMAND, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    model = folder / "runs/demo/model"
    info = json.loads((model / "model.json").read_text())
    assert (info["projector"], info["projector_tokens"]) == ("resampler", 6)
    assert json.loads((model / "adapter/adapter_config.json").read_text())["r"] == 4 and not (model / "llm").exists()
    question = "--structure shards/demo/example.pdb --question 'How many residues has it?'"
    asked = execute(f"python launch/chat.py --model runs/demo/model {question}", folder)
    assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr[-3000:]
