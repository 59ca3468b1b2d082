"""A trained model with its encoders, ready to be asked.

Each question is asked of the protein afresh, as in training: the model has never seen an earlier answer in its prompt.
What stands before the question is computed once for a protein, and kept for the few that were asked about last.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from proteingpt.config import EncodersConfig
from proteingpt.data.prompts import Prompt
from proteingpt.encoders.pair import Encoders
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.inference import subject
from proteingpt.inference.generate import Asked, Decoding, answer_batch, protein_prefix, stream
from proteingpt.model import assemble
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

KEPT_PREFIXES = 8


class TooLong(ValueError):
    """A protein or a question that leaves no room for an answer in the LLM's context."""


USER_ERRORS = (*subject.USER_ERRORS, assemble.ModelError, WeightsNotFound, UnknownWeights, BadCheckpoint, TooLong)


@dataclass(frozen=True)
class Assistant:
    """For one thread at a time: whoever asks holds `lock`."""

    model: ProteinGPT
    prompt: Prompt
    encoders: Encoders
    max_new_tokens: int = 300
    decoding: Decoding = Decoding()
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    prefixes: OrderedDict = field(default_factory=OrderedDict, repr=False, compare=False)  # {digest: (P, width)}

    @classmethod
    def load(
        cls, directory: str | Path, *, device=None, max_new_tokens: int = 300, decoding: Decoding = Decoding()
    ) -> "Assistant":
        """From a directory that training exported (RUN/model). On a GPU in bf16, on a CPU in fp32."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, tokenizer, info = assemble.load_exported(Path(directory), dtype, device)
        encoders = Encoders.load(
            EncodersConfig(
                esm2=info.esm2, esm_if1=info.esm_if1, esm2_layer=info.esm2_layer, weights_dir=info.weights_dir,
                dtype=info.encoder_dtype,
            ),  # fmt: skip
            device,
        )
        for encoder, wanted in (
            (encoders.sequence, info.esm2_fingerprint),
            (encoders.structure, info.esm_if1_fingerprint),
        ):
            if wanted and encoder.fingerprint != wanted:  # unknown for published rows
                raise assemble.ModelError(
                    f"{type(encoder).__name__} has other weights (sha256 {encoder.fingerprint[:12]}) than those that "
                    f"{directory} was trained with ({wanted[:12]}): its answers would mean nothing. Put the file back "
                    f"that {Path(directory) / 'model.json'} names, or train again"
                )
        prompt = Prompt(tokenizer, info.template, max_answer_tokens=max_new_tokens)
        return cls(model, prompt, encoders, max_new_tokens, decoding)

    @property
    def reads(self) -> tuple[bool, bool]:
        """Whether the model reads structures, and sequences."""
        return bool(self.encoders.structure.width), bool(self.encoders.sequence.width)

    def missing(self, protein: Protein) -> list[str]:
        """What the model does not get of the protein, in sentences. Raises SubjectError where it would get nothing."""
        return subject.missing(protein, *self.reads)

    def ask(self, protein: Protein, questions: list[str]) -> list[str]:
        """One answer to each question, greedy unless `decoding` says otherwise; N/A where the model has nothing to say.

        Raises SubjectError or TooLong for what cannot be asked.
        """
        if not questions:
            return []
        decoding = self.fit(protein, questions)
        asked = Asked(protein.key, self.prefix(protein), questions)
        return answer_batch(self.model.llm, self.prompt, [asked], decoding)[0]

    def stream(self, protein: Protein, question: str) -> Iterator[str]:
        """The same answer in pieces, as they come."""
        decoding = self.fit(protein, [question])
        asked = Asked(protein.key, self.prefix(protein), [question])
        yield from stream(self.model.llm, self.prompt, asked, decoding)

    def fit(self, protein: Protein, questions: list[str]) -> Decoding:
        """`decoding` with as many new tokens as the LLM's context has room for behind the longest question."""
        self.missing(protein)
        context = assemble.context_length(self.model.llm.config)
        used = self.num_positions(protein) + max(map(len, self.prompt.question_ids(questions)))
        if used >= context:
            raise TooLong(
                f"{subject.name_of(protein)} with its {len(protein)} residues and the question take {used} positions, "
                f"and this LLM's context has {context}: take a shorter chain, a domain of it, or a shorter question"
            )
        room = min(self.max_new_tokens, context - used)
        return Decoding(room, self.decoding.temperature, self.decoding.top_p, self.decoding.seed)

    def shown(self, protein: Protein) -> tuple[bool, bool]:
        """Whether the prompt has structure rows, and sequence rows."""
        reads_structure, reads_sequence = self.reads
        return reads_structure and subject.has_structure(protein), reads_sequence and subject.has_sequence(protein)

    def num_positions(self, protein: Protein) -> int:
        """Of all that stands before the question."""
        rows = self.model.projector.positions(len(protein) + ENCODER_EXTRA_ROWS)
        return len(self.prompt.prefix_ids) + rows * sum(self.shown(protein))

    @torch.no_grad()
    def prefix(self, protein: Protein) -> torch.Tensor:
        """(P, width) embeddings of what stands before a question. Rows of a part that is not there are left out."""
        key = digest(protein)
        if key not in self.prefixes:
            encoders = (self.encoders.structure, self.encoders.sequence)
            device = self.model.llm.device
            rows = [
                encoder.encode([protein])[0] if shown else torch.zeros(0, encoder.width, device=device)
                for encoder, shown in zip(encoders, self.shown(protein), strict=True)
            ]
            self.prefixes[key] = protein_prefix(self.model, self.prompt, *rows)
        self.prefixes.move_to_end(key)
        while len(self.prefixes) > KEPT_PREFIXES:
            self.prefixes.popitem(last=False)
        return self.prefixes[key]


def digest(protein: Protein) -> bytes:
    """Of what the encoders read, whatever the protein is called."""
    confidence = b"" if protein.confidence is None else protein.confidence.tobytes()
    parts = (protein.sequence.encode(), protein.backbone.tobytes(), confidence)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
