"""What a pack is held to: its questions, each asked alone, written out without the package's packs or attention.

Ids joined by hand, protein rows projected by hand, one ordinary causal sequence a question, transformers' own (eager)
attention, cross-entropy over the answer's tokens. transformers rounds norms and softmax to fp32 whatever the model's
precision, so for fp64 the definition brings its own softmax, and both sides use torch's RMSNorm.
"""

import contextlib
import json

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM

from proteingpt.config import ModelConfig
from proteingpt.data.collate import Group, collate
from proteingpt.demo.llm import FAMILIES, write_tiny_llm
from proteingpt.model import attention
from proteingpt.model.assemble import build_model
from proteingpt.protein import Protein

STRUCTURE_WIDTH, SEQUENCE_WIDTH = 12, 20
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

# What a family's configuration is changed in: the rotary scaling of Llama 3.1, at a context so short that it bites, and
# a sliding window that no sample here is longer than.
VARIANTS = {
    "llama3.1": ("llama3", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }}),
    "mistral with a window": ("mistral", {"sliding_window": 32}),
}  # fmt: skip
LLMS = (*FAMILIES, *VARIANTS)
# Ways to the attention of a pack: one dense mask a group; prefix and branches apart; FlexAttention's row and rule.
WAYS = ("sdpa", "apart", "flex")


# Of the weights. Large, so that attention is far from uniform and who sees whom shows in the loss; but bf16 rounds the
# gradients of such a model, packed or not, by 2 to 5 % of the exact ones: there between that and transformers' 0.02.
SCALE = {torch.float64: 0.15, torch.float32: 0.15, torch.bfloat16: 0.05}


def write_llm(directory, name: str, texts: list[str], scale: float = SCALE[torch.float64]):
    family, changes = VARIANTS.get(name, (name, {}))
    write_tiny_llm(directory, texts, family=family, width=32, vocab_size=280, initializer_range=scale)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return directory


def load(directory, dtype: torch.dtype, structure_width: int = STRUCTURE_WIDTH):
    """(ProteinGPT that trains in full, an LLM of the same weights for the definition)."""
    config = ModelConfig(llm=str(directory), train="full")
    model = build_model(config, structure_width, SEQUENCE_WIDTH, dtype, seed=4)
    kind = "plain_for_packs" if dtype == torch.float64 else "eager"
    alone = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=kind)
    if dtype == torch.float64:
        use_exact_norms(model.llm)
        use_exact_norms(alone)
    return model, alone


@contextlib.contextmanager
def by(model, way: str):
    """The model's attention in one of WAYS."""
    limits = dict(attention.DENSE_TOKENS)
    model.attention_way = "flex" if way == "flex" else "sdpa"
    attention.DENSE_TOKENS["cpu"] = 0 if way == "apart" else 10**9
    try:
        yield
    finally:
        model.attention_way = "auto"
        attention.DENSE_TOKENS.update(limits)


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention in the precision of its input: (1, H, T, D) -> (1, T, H, D). Query head h reads key head
    h // (H / number of key heads)."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("plain_for_packs", plain_attention)


def use_exact_norms(llm):
    for name, module in list(llm.named_modules()):
        if "RMSNorm" in type(module).__name__:
            norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            llm.set_submodule(name, norm)


# ------------------------------------------------------------------------------------------------- groups and rows


def make_group(number: int, shape, seed: int) -> Group:
    """shape: (residues, ids before the protein, ((question ids, answer ids), ...)), as counts."""
    residues, before, branches = shape
    rng = np.random.default_rng((seed, number))
    protein = Protein(f"p{number}", "A", "G" * residues, rng.normal(size=(residues, 3, 3)).astype(np.float32))

    def ids(count: int) -> list[int]:
        return rng.integers(3, 262, count).tolist()

    return Group(protein.key, protein, ids(before), [(ids(question), ids(answer)) for question, answer in branches])


def make_rows(groups, dtype):
    """What encoders give: two lists of (residues + 2, width), one for each group's protein."""
    rows = ([], [])
    for number, group in enumerate(groups):
        generator = torch.Generator().manual_seed(number)
        for kind, width in zip(rows, (STRUCTURE_WIDTH, SEQUENCE_WIDTH)):
            kind.append(torch.randn(len(group.protein) + 2, width, generator=generator, dtype=torch.float64).to(dtype))
    return rows


# --------------------------------------------------------------------------------------------------- both sides


def packed(model, groups, rows=None) -> dict[str, torch.Tensor]:
    """The trainer's way: {"loss", every parameter's gradient}."""
    model.zero_grad()
    loss = model(collate(groups), *(rows or make_rows(groups, model.llm.dtype)))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def one_at_a_time(model, llm, groups, rows=None) -> dict[str, torch.Tensor]:
    """The definition, with the projector's weights and the other copy of the LLM. Summed over questions in fp64, or the
    sum of many would be rounded more than each."""
    linear = model.projector
    parts = (("projector", linear), ("llm", llm))
    parameters = {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}
    gradients = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    table = llm.get_input_embeddings().weight
    structure_rows, sequence_rows = rows or make_rows(groups, table.dtype)
    total = torch.zeros((), dtype=torch.float64)
    for group, structure, sequence in zip(groups, structure_rows, sequence_rows):
        for question, answer in group.branches:
            embeddings = torch.cat(
                [
                    table[group.prefix_ids],
                    structure @ linear.structure.weight.T + linear.structure.bias,
                    sequence @ linear.sequence.weight.T + linear.sequence.bias,
                    table[question],
                    table[answer],
                ]
            )
            logits = llm(inputs_embeds=embeddings[None]).logits[0]
            answered = logits[-len(answer) - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(answered, torch.tensor(answer), reduction="sum")
            for sum_of_one, one in zip(gradients.values(), torch.autograd.grad(loss, list(parameters.values()))):
                sum_of_one += one
            total += loss.detach()
    return {"loss": total, **gradients}


def errors(found, wanted) -> dict[str, float]:
    """Relative error of each tensor, in the Euclidean norm. A gradient below 1e-6 of the largest counts as that."""
    largest = max(float(value.double().norm()) for name, value in wanted.items() if name != "loss")
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - value.double()).norm())
        / max(float(value.double().norm()), 0.0 if name == "loss" else 1e-6 * largest)
        for name, value in wanted.items()
    }


def assert_close(found, wanted, tolerance: float):
    far = {name: error for name, error in errors(found, wanted).items() if not error <= tolerance}
    assert not far, f"relative errors above {tolerance}: {far}"


def together(side) -> dict[str, torch.Tensor]:
    """Loss, all gradients as one vector, and the projector's as another: single ones of a bf16 model are rounded by
    more than the whole."""
    names = sorted(name for name in side if name != "loss")
    parts = {"gradients": names, "projector": [name for name in names if name.startswith("projector.")]}
    return {"loss": side["loss"], **{part: torch.cat([side[n].flatten() for n in of]) for part, of in parts.items()}}
