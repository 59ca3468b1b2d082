"""LoRA under ZeRO is LoRA as its paper writes it: W + alpha / rank * B A in the place of W, by one process, one
question at a time, in plain torch."""

from dataclasses import replace

import pytest
import torch
from ranks import RankError, World
from small_run import Case, SmallRun, plain_question, train_on_rank, zero_options
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from proteingpt.config import LoraConfig
from proteingpt.training.schedule import learning_rate

STEPS, SAVED = 5, 2
RANK, ALPHA, FACTOR = 4, 12.0, 0.5
LINEAR = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def make_case(demo_assets, qwen2):
    def make(zero="zero0", more_zero=(), bf16=False, dropout=0.0, eight_bit=False, **options) -> Case:
        stage = (("max_steps", STEPS), ("llm_lr_factor", FACTOR))
        model = (("lora", LoraConfig(rank=RANK, alpha=ALPHA, dropout=dropout)), ("llm_8bit", eight_bit))
        zero = {**zero_options(zero), **dict(more_zero)}
        return Case(str(demo_assets), str(qwen2), "lora", zero, bf16, stage=stage, model=model, **options)

    return make


class PlainLora:
    """What `plain_question` asks of an LLM, with A as the trainer draws it and B zero."""

    def __init__(self, llm, drawn):
        self.llm, self.frozen = llm.requires_grad_(False), dict(llm.named_parameters())
        self.a, self.b = {}, {}
        for layer in range(llm.config.num_hidden_layers):
            for linear in LINEAR:
                name = f"model.layers.{layer}.{linear}"
                out_width, in_width = self.frozen[f"{name}.weight"].shape
                self.a[name] = drawn[f"{name}.lora_A.default.weight"].detach().clone().requires_grad_()
                self.b[name] = torch.zeros(out_width, RANK, requires_grad=True)
                assert self.a[name].shape == (RANK, in_width)

    def __call__(self, **inputs):
        changed = {f"{n}.weight": self.frozen[f"{n}.weight"] + ALPHA / RANK * self.b[n] @ self.a[n] for n in self.a}
        return functional_call(self.llm, changed, (), inputs)

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()


@pytest.fixture(scope="module")
def plain(make_case):
    """(losses, gradient norms) of the definition."""
    run = SmallRun(make_case())
    tokenizer, model = AutoTokenizer.from_pretrained(run.case.llm), run.model()
    llm = AutoModelForCausalLM.from_pretrained(run.case.llm, dtype=torch.float32, attn_implementation="eager")
    projector, lora = model.projector, PlainLora(llm, dict(model.llm.named_parameters()))
    adapters = [*lora.a.values(), *lora.b.values()]
    matrices = [projector.structure.weight, projector.sequence.weight]
    vectors = [projector.structure.bias, projector.sequence.bias]
    decay = run.stage.weight_decay
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": decay, "factor": 1.0},
            {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
            {"params": adapters, "weight_decay": decay, "factor": FACTOR},
        ],
        betas=run.stage.betas,
    )
    losses, norms = [], []
    for step in range(STEPS):
        asked = [
            (run.shards.read(s).protein, run.shards.read_text(s)[1][t]) for s, turns in run.groups(step) for t in turns
        ]
        terms = [plain_question(lora, projector, tokenizer, run, *question) for question in asked]
        loss = sum(term for term, _ in terms) / sum(count for _, count in terms)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*matrices, *vectors, *adapters], 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, run.stage) * group["factor"]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_two_ranks_train_as_the_definition_does(worlds, plain, make_case, zero):
    losses, norms = plain
    for done in worlds(2)(train_on_rank, make_case(zero, activation_checkpointing=zero == "zero2")):
        assert done["losses"] == pytest.approx(losses, rel=RELATIVE)
        assert done["grad_norms"] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < 0.95 * losses[0] and max(norms) > 1


def test_without_separate_rates_it_would_be_another_run(worlds, plain, make_case):
    same = replace(make_case(), stage=(("max_steps", STEPS),))
    assert worlds(1)(train_on_rank, same)[0]["losses"][-1] != pytest.approx(plain[0][-1], rel=1e-3)


@pytest.mark.parametrize("before, after", [(("zero3", 2), ("zero2", 1)), (("zero1", 1), ("zero3", 2))])
def test_a_checkpoint_goes_on_under_another_stage_and_number_of_ranks(worlds, plain, make_case, before, after):
    saved = worlds(before[1])(train_on_rank, make_case(before[0]), 0, None, SAVED)[0]["saved"]
    names = [name for name in saved["weights"] if name.startswith("llm.")]
    assert len(names) == 2 * len(LINEAR) * 2 and not any("base_layer" in name for name in names)
    done = worlds(after[1])(train_on_rank, make_case(after[0]), SAVED, saved)[0]
    assert done["losses"] == pytest.approx(plain[0][SAVED:], rel=RELATIVE)
    assert all(
        torch.equal(done["begun_with"][kind][name], value) for kind in saved for name, value in saved[kind].items()
    )


def test_weights_kept_once_more_in_each_node_change_nothing_and_can_be_begun_anew(worlds, plain, make_case):
    """ZeRO++'s hierarchical partition, the part of it that needs no GPU; twice in one process, as two stages are."""
    for _ in range(2):
        done = worlds(2)(train_on_rank, make_case("zero3", {"zero_hpz_partition_size": 2}))[0]
        assert done["losses"] == pytest.approx(plain[0], rel=RELATIVE)


@pytest.mark.parametrize("how", ["bf16", "eight_bit"])
def test_fewer_bits_stay_near(worlds, plain, make_case, how):
    done = worlds(2)(train_on_rank, make_case("zero2", **{how: True}))[0]
    assert done["losses"] == pytest.approx(plain[0], rel=0.01) and done["losses"] != plain[0]


def test_8_bits_do_not_go_with_zero_3(worlds, make_case):
    with pytest.raises(RankError, match="ModelError: model.llm_8bit does not go with ZeRO 3"):
        World(1)(train_on_rank, make_case("zero3", eight_bit=True))


def test_with_dropout_a_run_goes_on_as_it_would_have(worlds, plain, make_case):
    whole = worlds(2)(train_on_rank, make_case("zero2", dropout=0.3), 0, None, SAVED)[0]
    assert whole["losses"][2:] != pytest.approx(plain[0][2:], rel=1e-4), "nothing was dropped"
    resumed = worlds(2)(train_on_rank, make_case("zero2", dropout=0.3), SAVED, whole["saved"])[0]
    assert resumed["losses"] == whole["losses"][SAVED:]
