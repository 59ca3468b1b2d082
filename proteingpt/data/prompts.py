"""Prompts: how a protein, a question and an answer become token ids.

A turn is read as  [BOS] before <rows of the protein> after(question) answer end,  each text tokenised on its own, as
the released code does; so what stands before the protein is the same for all of its questions. Loss is on answer and
end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from proteingpt.protein import Turn


@dataclass(frozen=True)
class Template:
    """before, after: the text on either side of the protein; `{question}` in `after`. end: the symbol that closes an
    answer; None stands for the tokenizer's own end-of-sequence token."""

    before: str
    after: str
    end: str | None


# Wordings of arXiv 2408.11363, section 3 ("paper"), and of its published code ("released"), by stage. The paper gives
# no end symbol for its form, so we end with the tokenizer's.
TEMPLATES = {
    ("paper", "align"): Template("Q: <protein>", "</protein>{question} A: ", None),
    ("paper", "instruct"): Template("Q: <protein>", "</protein>{question} A: ", None),
    ("released", "align"): Template("", "", "\n"),
    ("released", "instruct"): Template("###Human: <protein>", "</protein> {question} ###Assistant: ", "###"),
}


@dataclass(frozen=True)
class Prompt:
    """A template with a tokenizer (any of transformers'). max_answer_tokens cuts the answer, never the prompt."""

    tokenizer: object
    template: Template
    max_answer_tokens: int

    @property
    def prefix_ids(self) -> list[int]:
        """Ids before the protein: BOS, where the tokenizer has one, and the text in front."""
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self.tokenise([self.template.before])[0]

    @property
    def end_text(self) -> str:
        """What the decoded answer stops at."""
        return self.tokenizer.eos_token if self.template.end is None else self.template.end

    def question_ids(self, questions: list[str]) -> list[list[int]]:
        return self.tokenise([self.template.after.replace("{question}", question) for question in questions])

    def answer_ids(self, answers: list[str]) -> list[list[int]]:
        """Answer and end symbol; one that is too long loses its end symbol with its tail, so that the model does not
        learn to stop in the middle of a sentence."""
        texts = [answer + (self.template.end or "") for answer in answers]
        ids = self.tokenise(texts)
        if self.template.end is None:
            ids = [i + [self.tokenizer.eos_token_id] for i in ids]
        return [i[: self.max_answer_tokens] for i in ids]

    @property
    def is_bare(self) -> bool:
        """Whether the tokenizer is one of the library `tokenizers` in transformers' wrapper, and no class that does
        something of its own with a text."""
        from transformers import PreTrainedTokenizerFast  # late: who only reads shards has no use for it

        return getattr(type(self.tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus

    @cached_property
    def encode(self) -> Callable[[list[str]], list[list[int]]]:
        """Ids of each text, without special tokens. A bare tokenizer is used without its wrapper, as a copy of its own:
        in two thirds of the time, and from several threads, for which the wrapper, that sets it anew each time, is
        not."""
        tokenizer = self.tokenizer
        if not self.is_bare:
            return lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
        bare = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        bare.no_truncation()
        bare.no_padding()
        bare.encode_special_tokens = tokenizer.split_special_tokens
        return lambda texts: [found.ids for found in bare.encode_batch_fast(texts, add_special_tokens=False)]

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        filled = [text for text in texts if text]
        ids = iter(self.encode(filled) if filled else ())
        return [next(ids) if text else [] for text in texts]


def turns_of_stage(stage: str, description: str, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """What a sample asks in a stage: align has one empty question whose answer is the description."""
    if stage == "align":
        return (Turn("", description),) if description else ()
    return turns
