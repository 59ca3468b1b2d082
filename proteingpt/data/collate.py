"""Groups to a pack: one row of tokens, no padding.

A group is one protein prefix and the branches (questions with their answers) that share it. A branch sees its own
prefix and itself, and its positions go on from the end of the prefix: for the model it is as if it stood alone.
"""

from dataclasses import dataclass, replace

import torch

from proteingpt.protein import PrefixLength, Protein, prefix_length


@dataclass(frozen=True)
class Group:
    """prefix_ids stand before the protein; each branch is (question ids, answer ids).

    prefix_length: positions of the protein in the prompt. rows: (structure, sequence), (L + 2, width) each on the CPU,
    where they were read with the protein.
    """

    key: str
    protein: Protein
    prefix_ids: list[int]
    branches: list[tuple[list[int], list[int]]]
    prefix_length: PrefixLength = prefix_length
    rows: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Pack:
    """T tokens, P of them placeholders for protein rows, A answer tokens, G groups.

    token_ids, position_ids: int64 (T,). group_starts: G + 1 ints, where each group begins in the row.
    branch_ids: int64 (T,), 0 on a prefix, 1, 2, .. on its branches. protein_positions: int64 (P,), in the order of
    `proteins`. predict_positions, targets: int64 (A,): the logits at predict_positions[a] are to give targets[a].
    weights: float32 (A,), 0 masks a target. keys, proteins: one for each group. rows: of each group, if they were read.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    group_starts: list[int]
    branch_ids: torch.Tensor
    protein_positions: torch.Tensor
    predict_positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    keys: list[str]
    proteins: list[Protein]
    rows: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_answer_tokens(self) -> int:
        return int(self.weights.sum())

    def to(self, device) -> "Pack":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def silenced(self) -> "Pack":
        """The same work with no say in the loss: what a rank runs when the step has no group left for it."""
        return replace(self, weights=torch.zeros_like(self.weights))


def branch_length(question_length, answer_length):
    """Tokens that a question takes behind its prefix, ints or arrays: the last answer token is predicted, never
    read."""
    return question_length + answer_length - 1


def collate(groups: list[Group]) -> Pack:
    tokens, positions, branches, starts = [], [], [], [0]
    protein_positions, predict, targets = [], [], []
    for group in groups:
        begin = len(tokens)
        num_rows = group.prefix_length(len(group.protein))
        protein_begin = begin + len(group.prefix_ids)
        protein_positions += range(protein_begin, protein_begin + num_rows)
        tokens += group.prefix_ids + [0] * num_rows
        prefix_end = len(tokens)
        prefix_tokens = prefix_end - begin
        positions += range(prefix_tokens)
        branches += [0] * prefix_tokens
        for number, (question, answer) in enumerate(group.branches, start=1):
            assert answer, f"{group.key}: an answer without tokens cannot be learned"
            read = [*question, *answer[:-1]]
            first_target = len(tokens) + len(question)
            # The first answer token is predicted by what stands before it: the question's end or, without a question,
            # the end of the prefix, which all branches share.
            before = first_target - 1 if question else prefix_end - 1
            predict += [before, *range(first_target, first_target + len(answer) - 1)]
            targets += answer
            tokens += read
            positions += range(prefix_tokens, prefix_tokens + len(read))
            branches += [number] * len(read)
        starts.append(len(tokens))

    def as_tensor(values):
        return torch.tensor(values, dtype=torch.int64)

    return Pack(
        token_ids=as_tensor(tokens),
        position_ids=as_tensor(positions),
        group_starts=starts,
        branch_ids=as_tensor(branches),
        protein_positions=as_tensor(protein_positions),
        predict_positions=as_tensor(predict),
        targets=as_tensor(targets),
        weights=torch.ones(len(targets)),
        keys=[group.key for group in groups],
        proteins=[group.protein for group in groups],
        rows=None if any(group.rows is None for group in groups) else [group.rows for group in groups],
    )
