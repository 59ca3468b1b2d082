"""What a stage has to compute: its packs, as the plan makes them, of lengths that are read from shards or assumed.

Some thousand proteins stand for all: they are grouped, packed and cut into steps by data/plan.py itself, and what a
step holds on average is multiplied by the steps of the whole set.
"""

from dataclasses import dataclass, replace

import numpy as np

from proteingpt.cluster.shapes import Pairs, pairs_of
from proteingpt.config import StageConfig
from proteingpt.data import plan
from proteingpt.data.collate import Group, Pack, branch_length, collate
from proteingpt.protein import PrefixLength, Protein, prefix_length

# Lengths of PDB chains: median, 90th percentile, and a tail beyond it that falls as a power.
MEDIAN_LENGTH, P90_LENGTH, TAIL_POWER, SHORTEST, LONGEST = 230, 400, 2.5, 20, 1500
# Tokens as Llama 3's tokenizer cuts the published texts: before the protein, a question, an answer, an abstract (180
# words).
BEFORE, QUESTION, ANSWER, DESCRIPTION = 6, 24, 4, 250
SAMPLED, STEPS_LOOKED_AT = 2048, 32


def pdb_lengths(num: int, seed: int) -> list[int]:
    """Log-normal up to the 90th percentile, a power law above."""
    import torch

    quantile = np.random.default_rng((seed, num)).random(num)
    sigma = np.log(P90_LENGTH / MEDIAN_LENGTH) / 1.2816
    normal = torch.special.ndtri(torch.from_numpy(np.minimum(quantile, 0.9))).numpy()
    body = MEDIAN_LENGTH * np.exp(sigma * normal)
    tail = P90_LENGTH * ((1 - quantile) / 0.1) ** (-1 / TAIL_POWER)
    return np.where(quantile < 0.9, body, tail).clip(SHORTEST, LONGEST).astype(int).tolist()


def scaled_lengths(num: int, mean: float, seed: int) -> np.ndarray:
    """int64: shaped as the PDB's, with about this mean."""
    drawn = np.array(pdb_lengths(num, seed), np.float64)
    return np.maximum(1, np.rint(drawn * mean / drawn.mean())).astype(np.int64)


@dataclass(frozen=True)
class DataSet:
    """The training split. residues: int64, of the sampled proteins; num_proteins: for which they stand; questions:
    (question tokens, answer tokens) of each sampled protein's turns; descriptions: tokens. source: where the lengths
    are from.
    every_length: of all proteins, where that is known: the longest decides what fits."""

    residues: np.ndarray
    num_proteins: float
    questions: list[list[tuple[int, int]]]
    descriptions: list[int]
    source: str
    every_length: np.ndarray | None = None

    def turns(self, stage: str) -> list[list[tuple[int, int]]]:
        """As prompts.turns_of_stage asks them; behind a description's empty question stands the end of the template."""
        return [[(4, tokens)] for tokens in self.descriptions] if stage == "align" else self.questions


@dataclass(frozen=True)
class PackWork:
    """tokens: in the row; answers: predicted; pairs: that see each other; residues: encoded for it; proteins:
    groups."""

    tokens: int
    answers: int
    pairs: Pairs
    residues: int
    proteins: int


@dataclass(frozen=True)
class StageWork:
    """steps: the packs of some. num_steps: of the whole stage. largest: the longest pack that the stage may have.
    asked: questions of a group, and the tokens of a question and of an answer, on average."""

    steps: list[list[PackWork]]
    num_steps: int
    steps_per_epoch: int
    largest: Pack
    asked: tuple[int, int, int]

    def mean(self, name: str) -> float:
        """Of a step."""
        return sum(getattr(pack, name) for packs in self.steps for pack in packs) / len(self.steps)


def stage_work(
    data: DataSet,
    stage_name: str,
    stage: StageConfig,
    seed: int,
    length: PrefixLength,
    context: int,
    max_residues=None,
    crop=False,
) -> StageWork:
    """context: tokens that a sample may have; longer ones are left out, as are those over max_residues, or cut to it
    (crop). PlanError where a question fits no pack."""
    turns = [[(q, min(a, stage.max_answer_tokens)) for q, a in asked] for asked in data.turns(stage_name)]
    longest = np.array([max((q + a for q, a in asked), default=0) for asked in turns])
    residues = np.minimum(data.residues, max_residues) if crop else data.residues
    keep = usable(residues, longest, length, context, max_residues)
    if not keep.any():
        raise plan.PlanError(
            f"no protein fits the LLM's context of {context} tokens and data.max_residues ({max_residues})"
        )
    residues, turns = residues[keep], [asked for asked, kept in zip(turns, keep) if kept]
    samples = plan.Samples(
        ids=plan.mix(np.arange(len(residues)), 17),
        prefix_tokens=BEFORE + length(residues),
        first_turn=np.concatenate(([0], np.cumsum([len(asked) for asked in turns]))),
        turn_tokens=np.array([branch_length(q, a) for asked in turns for q, a in asked], np.int64),
        weights=np.ones(len(residues)),
    )
    cut = plan.Cut(
        seed, stage.questions_per_group, stage.samples_per_step, stage.tokens_per_step, stage.tokens_per_pack,
        stage.questions_per_protein,
    )  # fmt: skip
    size, asked = plan.survey(samples, cut)
    totals = plan.Totals(np.array([size]), np.array([asked]), plan.packing_rate(samples, cut))
    times = data.num_proteins * keep.mean() / len(residues)
    whole = replace(
        totals,
        sizes=np.rint(totals.sizes * times).astype(np.int64),
        questions=np.rint(totals.questions * times).astype(np.int64),
    )
    per_epoch = plan.num_steps(whole, cut)
    window = plan.plan_window(samples, cut, 0, plan.num_steps(totals, cut))
    steps = [window.step(number) for number in range(min(STEPS_LOOKED_AT, window.num_steps))]
    made = [[pack_work(groups, residues, turns, length) for groups in step] for step in steps]
    groups = max(
        (groups for step in steps for groups in step), key=lambda g: pack_work(g, residues, turns, length).tokens
    )
    fullest = collate([fake_group(int(residues[s]), [turns[s][t] for t in chosen], length) for s, chosen in groups])
    alone = longest_alone(data, turns, stage, length, context, max_residues, crop)
    pairs = [
        pair for step in steps for groups in step for s, chosen in groups for pair in (turns[s][t] for t in chosen)
    ]
    per_group = round(len(pairs) / sum(len(groups) for step in steps for groups in step))
    question, answer = (max(1, round(sum(column) / len(pairs))) for column in zip(*pairs))
    num_steps = min(stage.epochs * per_epoch, stage.max_steps or 2**63)
    return StageWork(
        made, num_steps, per_epoch, max(fullest, alone, key=lambda p: p.num_tokens), (per_group, question, answer)
    )


def usable(
    residues: np.ndarray, longest_turn, length: PrefixLength, context: int, max_residues: int | None
) -> np.ndarray:
    """bool, as data.index.usable keeps samples."""
    return (BEFORE + length(residues) + longest_turn <= context) & (residues <= (max_residues or residues.max()))


def longest_alone(
    data: DataSet, turns, stage: StageConfig, length: PrefixLength, context: int, max_residues, crop: bool
) -> Pack:
    """The longest protein of all that are used, with as much asked of it as of any sampled one: a group that few steps
    have, and that must fit."""
    every = data.residues if data.every_length is None else data.every_length
    every = np.minimum(every, max_residues) if crop else every
    most = max(turns, key=lambda asked: sum(q + a for q, a in asked[: stage.questions_per_group]))[
        : stage.questions_per_group
    ]
    kept = every[usable(every, max(q + a for q, a in most), length, context, max_residues)]
    residues = int(kept.max()) if len(kept) else int(every.min())
    room = (stage.tokens_per_pack or 2**63) - BEFORE - length(residues)
    while len(most) > 1 and sum(branch_length(q, a) for q, a in most) > room:
        most = most[:-1]
    return collate([fake_group(residues, most, length)])


def pack_work(groups, residues, turns, length: PrefixLength) -> PackWork:
    tokens = answers = 0
    pairs = []
    for sample, chosen in groups:
        prefix = BEFORE + length(int(residues[sample]))
        branches = [branch_length(*turns[sample][t]) for t in chosen]
        tokens += prefix + sum(branches)
        answers += sum(turns[sample][t][1] for t in chosen)
        pairs.append(pairs_of(prefix, branches))
    seen = Pairs(*map(sum, zip(*pairs)))
    return PackWork(tokens, answers, seen, sum(int(residues[sample]) for sample, _ in groups), len(groups))


def fake_group(
    residues: int, turns: list[tuple[int, int]], length: PrefixLength = prefix_length, ids=lambda count: [3] * count
) -> Group:
    """A group of these lengths. ids(n): n token ids."""
    protein = Protein("fake", "A", "G" * residues, np.zeros((residues, 3, 3), np.float32))
    return Group(protein.key, protein, ids(BEFORE), [(ids(q), ids(a)) for q, a in turns], length)


def make_pack(
    tokens: int, vocabulary: int, seed: int = 0, turns: int = 29, question: int = QUESTION, answer: int = ANSWER
) -> Pack:
    """Proteins of PDB lengths with `turns` questions each, the last ones cut so that the row has `tokens`, or
    nearly; one at the least."""
    rng = np.random.default_rng((seed, tokens))
    turn, groups, room = branch_length(question, answer), [], tokens
    for length in pdb_lengths(tokens, seed):
        longest = (room - turn - BEFORE) // prefix_length(1)  # most of a short row is left to questions
        if groups and (room <= 4 * turn or longest < 1):
            break
        residues = max(1, min(length, longest))
        room -= BEFORE + prefix_length(residues)
        asked = max(1, min(turns, room // turn))
        room -= asked * turn
        group = fake_group(
            residues, [(question, answer)] * asked, ids=lambda n: rng.integers(3, vocabulary, n).tolist()
        )
        groups.append(replace(group, key=f"p{len(groups)}"))
    return collate(groups)
