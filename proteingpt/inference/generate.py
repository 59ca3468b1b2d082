"""Answers: a protein's prefix is read once, and all of its questions are decoded behind it, of several proteins at
once.

A batch has one row for each question. Its key/value cache is [padding, prefix, padding, question, answer], where the
prefix's part is computed once and copied to its rows; what is padding is masked, and positions leave it out, so a row
is exactly what it would be alone. Rows that have ended leave the batch. Given up: one copy of the prefix for all rows,
which would take an attention of our own for each step. """

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from proteingpt.data.prompts import Prompt
from proteingpt.distributed import sum_over_ranks
from proteingpt.model import attention
from proteingpt.model.protein_gpt import ProteinGPT

EMPTY = "N/A"  # what an empty answer counts as, as in the published scoring

# Tokens that end a turn or a text of a chat model, beside the tokenizer's end of sequence: LLaMA-3, ChatML (Qwen), Phi,
# Gemma, Command R, GPT-NeoX. Vicuna, LLaMA-2 and Mistral end with their </s>.
END_OF_TURN = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>",
    "<|endoftext|>",
)  # fmt: skip

ROOM_TOKENS = 32  # the cache grows by so many positions at a time
KEPT_SHARE = 0.75  # ended rows leave the batch once no more than this share of it goes on


@dataclass(frozen=True)
class Decoding:
    """temperature 0 is greedy. top_p: the smallest set of tokens whose probabilities reach it is drawn from.

    A draw depends on seed, protein and question alone: not on the batch, nor on the ranks.
    """

    max_new_tokens: int = 300
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self):
        if not (self.max_new_tokens > 0 and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p}: wanted at "
                "least one token, a temperature of 0 (greedy) or more, and a top_p above 0 and up to 1"
            )


@dataclass(frozen=True)
class Asked:
    """A prefix, (P, width) embeddings, and the questions behind it. name: of the protein, for the draws."""

    name: str
    prefix: torch.Tensor
    questions: list[str]


def protein_prefix(model: ProteinGPT, prompt: Prompt, structure_rows, sequence_rows) -> torch.Tensor:
    """Embeddings (P, width) of what stands before a question. Rows are (L + 2, width), or (0, width) to leave one
    out."""
    num_rows = sum(model.projector.positions(len(rows)) for rows in (structure_rows, sequence_rows))
    front = prompt.prefix_ids
    ids = torch.tensor(front + [0] * num_rows, dtype=torch.int64, device=structure_rows.device)
    places = torch.arange(len(front), len(ids), device=ids.device)
    return model.embed(ids, places, [structure_rows], [sequence_rows])


@torch.no_grad()
def answer(
    model: ProteinGPT,
    prompt: Prompt,
    structure_rows: torch.Tensor,
    sequence_rows: torch.Tensor,
    questions: list[str],
    *,
    max_new_tokens: int,
    in_step: bool = False,
) -> list[str]:
    """Greedy answers to `questions` about one protein, whose encoder rows are (L + 2, width) each.

    in_step: every rank calls this equally often and decodes until all are done, as ZeRO 3 needs it.
    """
    prefix = protein_prefix(model, prompt, structure_rows, sequence_rows)
    decoding = Decoding(max_new_tokens)
    return answer_batch(model.llm, prompt, [Asked("", prefix, questions)], decoding, in_step=in_step)[0]


@torch.no_grad()
def answer_batch(
    llm, prompt: Prompt, asked: list[Asked], decoding: Decoding, *, in_step: bool = False
) -> list[list[str]]:
    """The answers to each protein's questions, decoded in one batch; EMPTY where the model has nothing to say."""
    ids: list[list[int]] = [[] for one in asked for _ in one.questions]
    for step in decode(llm, prompt, asked, decoding, in_step=in_step):
        for row, token in step:
            ids[row].append(token)
    texts = iter([clean(text, prompt) for text in prompt.tokenizer.batch_decode(ids)])
    return [[next(texts) for _ in one.questions] for one in asked]


@torch.no_grad()
def stream(llm, prompt: Prompt, asked: Asked, decoding: Decoding) -> Iterator[str]:
    """Pieces of the answer to the one question that is asked, as they come; joined they are what `answer_batch` gives.

    What may be the beginning of the end symbol, or of a character, is held back until it is known.
    """
    ids, shown, ends = [], "", end_texts(prompt)
    for step in decode(llm, prompt, [asked], decoding):
        ids += [token for _, token in step]
        text = prompt.tokenizer.decode(ids)
        sure = cut(text[: len(text) - max(held_back(text, end) for end in (*ends, "\ufffd"))], ends).strip()
        if len(sure) > len(shown):
            yield sure[len(shown) :]
            shown = sure
    whole = clean(prompt.tokenizer.decode(ids), prompt)
    if whole != shown:
        yield whole[len(shown) :]


def held_back(text: str, end: str) -> int:
    """Length of the longest tail of `text` that is a beginning of `end`."""
    return next((n for n in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:n])), 0)


def clean(text: str, prompt: Prompt) -> str:
    """The answer up to its end symbol, without special tokens; EMPTY where nothing is left."""
    return cut(text, end_texts(prompt)).strip() or EMPTY


def cut(text: str, ends) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text


def stop_ids(prompt: Prompt, llm) -> set[int]:
    """Ids that end an answer: the tokenizer's and the configuration's end of sequence, and ends of a turn it knows."""
    tokenizer, configured = prompt.tokenizer, getattr(llm.config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    return ids | {i for name, i in special_tokens(tokenizer).items() if name in END_OF_TURN}


def end_texts(prompt: Prompt) -> tuple[str, ...]:
    """What an answer's text is cut at: the end symbol, and the texts of the tokens that end it."""
    special = special_tokens(prompt.tokenizer)
    return (prompt.end_text, prompt.tokenizer.eos_token, *(name for name in END_OF_TURN if name in special))


def special_tokens(tokenizer) -> dict[str, int]:
    """Tokens that stand for themselves: the same letters as plain text are no end of a turn."""
    return {token.content: i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}


def has_ended(prompt: Prompt, stops: set[int], rows: list[list[int]]) -> list[bool]:
    """For each row of ids. The end symbol is looked for in the text: a tokenizer may merge it with what stands
    before."""
    if not rows:  # of a rank that waits for others; the tokenizer would make one empty text of no ids
        return []
    window = len(prompt.end_text.encode()) + 1  # tokens that surely hold the symbol, one byte each at worst
    tails = prompt.tokenizer.batch_decode([ids[-window:] for ids in rows])
    return [ids[-1] in stops or prompt.end_text in tail for ids, tail in zip(rows, tails, strict=True)]


# ------------------------------------------------------------------------------------------------------- decoding


class RoomyLayer(DynamicLayer):
    """One layer's keys and values in a buffer with room for more, so that a step copies one position and not all.

    buffers: 2 tensors (rows, heads, capacity, head width); the first `length` positions are filled.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.buffers: list[torch.Tensor] = []
        self.length = 0

    @classmethod
    def of(cls, buffers: list[torch.Tensor], length: int) -> "RoomyLayer":
        layer = cls()
        layer.buffers, layer.length = buffers, length
        layer.dtype, layer.device, layer.is_initialized = buffers[0].dtype, buffers[0].device, True
        layer.show()
        return layer

    def show(self):
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(self, key_states, value_states, *_, **__):
        if not self.buffers:
            self.buffers = [new[:, :, :0] for new in (key_states, value_states)]
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            if self.length > self.buffers[i].shape[2]:
                rows, heads, _, width = self.buffers[i].shape
                more = self.buffers[i].new_empty(rows, heads, self.length - begin + ROOM_TOKENS, width)
                self.buffers[i] = torch.cat([self.buffers[i][:, :, :begin], more], dim=2)
            self.buffers[i][:, :, begin : self.length] = new
        self.show()
        return self.keys, self.values

    def keep(self, rows: torch.Tensor):
        self.buffers = [buffer[rows] for buffer in self.buffers]
        self.show()


def decode(
    llm, prompt: Prompt, asked: list[Asked], decoding: Decoding, *, in_step: bool = False
) -> Iterator[list[tuple[int, int]]]:
    """Yields (row, token id) of the rows that go on, step after step; rows count the questions in their order.

    The model's attention is transformers' own meanwhile, and the trainer's again afterwards.
    """
    llm.set_attn_implementation("sdpa")
    try:
        yield from _decode(llm, prompt, asked, decoding, in_step)
    finally:
        llm.set_attn_implementation(attention.NAME)


def _decode(llm, prompt, asked, decoding, in_step):
    embed, device = llm.get_input_embeddings(), asked[0].prefix.device
    branches = [
        [embed(torch.tensor(ids, dtype=torch.int64, device=device)) for ids in prompt.question_ids(one.questions)]
        for one in asked
    ]
    prefixes = [one.prefix for one in asked]
    if any(len(branch) == 0 for own in branches for branch in own):
        # A branch without tokens has nothing to predict from: the prefix's last token goes into each of them.
        branches = [[torch.cat([p[-1:], b]) for b in own] for p, own in zip(prefixes, branches, strict=True)]
        prefixes = [prefix[:-1] for prefix in prefixes]
    counts = [len(own) for own in branches]
    cache = read_prefixes(llm, prefixes, counts)
    flat = [branch for own in branches for branch in own]
    row_prefixes = [len(prefix) for prefix, count in zip(prefixes, counts, strict=True) for _ in range(count)]
    logits, seen, positions = read_questions(llm, cache, row_prefixes, flat)
    draws = [draw(decoding, one.name, question) for one in asked for question in one.questions]
    stops, written, active, done = stop_ids(prompt, llm), [[] for _ in flat], list(range(len(flat))), set()
    for step in range(decoding.max_new_tokens):
        tokens = choose(logits, decoding, [draws[row] for row in active])
        came = [(row, token) for row, token in zip(active, tokens, strict=True) if row not in done]
        for row, token in came:
            written[row].append(token)
        yield came
        flags = has_ended(prompt, stops, [written[row] for row, _ in came])
        done |= {row for (row, _), ended in zip(came, flags, strict=True) if ended}
        num_going = len(written) - len(done)
        if in_step:  # each step is a collective under ZeRO 3: nobody stops before the last
            num_going = sum_over_ranks([num_going], device)[0]
        if num_going == 0 or step + 1 == decoding.max_new_tokens:
            return
        # To leave a few ended rows in costs less than to copy the cache without them.
        keep = [place for place, row in enumerate(active) if row not in done] or [0]
        if len(keep) <= KEPT_SHARE * len(active):
            rows = torch.tensor(keep, device=device)
            for layer in cache.layers:
                layer.keep(rows)
            seen, positions, active = seen[rows], positions[rows], [active[place] for place in keep]
            tokens = [tokens[place] for place in keep]
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        logits = llm(
            inputs_embeds=embed(torch.tensor(tokens, device=device))[:, None],
            attention_mask=seen[:, None, None],
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        positions = positions + 1


def read_prefixes(llm, prefixes: list[torch.Tensor], counts: list[int]) -> Cache:
    """The cache behind the prefixes, each read once and copied to its `counts[i]` rows, padded on the left."""
    longest, ends = max(map(len, prefixes)), np.cumsum(counts)
    layers: list[RoomyLayer] = []
    for prefix, end, count in zip(prefixes, ends, counts, strict=True):
        if len(prefix) == 0:
            continue
        read = DynamicCache()
        positions = torch.arange(len(prefix), device=prefix.device)[None]
        llm(inputs_embeds=prefix[None], position_ids=positions, past_key_values=read, use_cache=True, logits_to_keep=1)
        for number, layer in enumerate(read.layers):
            if number == len(layers):
                shape = (ends[-1], layer.keys.shape[1], longest + ROOM_TOKENS)
                buffers = [new.new_zeros(*shape, new.shape[3]) for new in (layer.keys, layer.values)]
                layers.append(RoomyLayer.of(buffers, longest))
            for buffer, new in zip(layers[number].buffers, (layer.keys, layer.values), strict=True):
                buffer[end - count : end, :, longest - len(prefix) : longest] = new
    return Cache(layers=layers) if layers else Cache(layer_class_to_replicate=RoomyLayer)


def read_questions(llm, cache, prefix_lengths: list[int], branches: list[torch.Tensor]):
    """(logits (B, V) behind each question, seen: bool (B, T) which cached positions a row looks at, next positions
    (B,)).

    branches: (question tokens, width) each, at least one token; padded on the left to one length.
    """
    device = branches[0].device
    longest_prefix, longest = max(prefix_lengths), max(map(len, branches))
    padding = torch.tensor([longest - len(branch) for branch in branches], device=device)
    prefix = torch.tensor(prefix_lengths, device=device)
    embeddings = torch.stack([torch.cat([b.new_zeros(longest - len(b), b.shape[1]), b]) for b in branches])
    places = torch.arange(longest, device=device)
    in_prefix = torch.arange(longest_prefix, device=device) >= (longest_prefix - prefix)[:, None]
    in_question = places >= padding[:, None]
    causal = places[None, :] <= places[:, None]
    mask = torch.cat(
        [
            in_prefix[:, None].expand(-1, longest, -1),
            # A padding token sees itself, since attention to nothing is not a number.
            causal & in_question[:, None] | torch.eye(longest, dtype=torch.bool, device=device),
        ],
        dim=2,
    )
    logits = llm(
        inputs_embeds=embeddings,
        attention_mask=mask[:, None],
        position_ids=(prefix[:, None] + places - padding[:, None]).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, torch.cat([in_prefix, in_question], dim=1), prefix + longest - padding


# --------------------------------------------------------------------------------------------- choosing and batching


def draw(decoding: Decoding, name: str, question: str) -> np.random.Generator:
    digest = hashlib.sha256(repr((decoding.seed, name, question)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8]))


def choose(logits: torch.Tensor, decoding: Decoding, draws: list[np.random.Generator]) -> list[int]:
    """A token for each row of (B, V): the likeliest, or drawn from the nucleus at that temperature."""
    if decoding.temperature == 0:
        return logits.argmax(dim=1).tolist()
    probabilities = (logits.double() / decoding.temperature).softmax(dim=1)
    ordered, tokens = probabilities.sort(dim=1, descending=True, stable=True)
    nucleus = ordered.masked_fill(ordered.cumsum(dim=1) - ordered >= decoding.top_p, 0).cumsum(dim=1)
    drawn = torch.tensor([rng.random() for rng in draws], dtype=torch.float64, device=logits.device)[:, None]
    place = torch.searchsorted(nucleus, drawn * nucleus[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    return tokens.gather(1, place)[:, 0].tolist()


def cache_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes that one position takes in the cache, over all layers."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def batches(prefix_tokens: list[int], num_questions: list[int], more_tokens: int, max_tokens: int) -> list[list[int]]:
    """Proteins that are decoded together: numbers, the longest prefixes first, so that neighbours need little padding.

    more_tokens: positions beyond the prefix, question and answer. max_tokens: positions of all rows of a batch; a
    protein that is alone above it still is a batch. """
    order = sorted(range(len(prefix_tokens)), key=lambda i: (-prefix_tokens[i], i))
    made: list[list[int]] = []
    rows = longest = 0
    for i in order:
        if made and (rows + num_questions[i]) * (longest + more_tokens) <= max_tokens:
            made[-1].append(i)
            rows += num_questions[i]
        else:
            made.append([i])
            rows, longest = num_questions[i], prefix_tokens[i]
    return made
