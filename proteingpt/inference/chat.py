"""Ask a trained model about a structure file: once, or in a conversation.

Each question is asked of the protein afresh, as in training: the model has never seen an earlier answer in its prompt.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from proteingpt.config import EncodersConfig
from proteingpt.data.prompts import Prompt
from proteingpt.data.structure import StructureError, read_entry
from proteingpt.encoders.pair import Encoders
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.inference.generate import answer
from proteingpt.model import assemble
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.protein import Protein

USER_ERRORS = (StructureError, assemble.ModelError, WeightsNotFound, UnknownWeights, BadCheckpoint)


@dataclass(frozen=True)
class Assistant:
    """A model with its encoders, ready to be asked."""

    model: ProteinGPT
    prompt: Prompt
    encoders: Encoders
    max_new_tokens: int = 300

    @classmethod
    def load(cls, directory: str | Path, *, device=None, max_new_tokens: int = 300) -> "Assistant":
        """From a directory that training exported (RUN/model). On a GPU in bf16, on a CPU in fp32."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, tokenizer, info = assemble.load_exported(Path(directory), dtype, device)
        encoders = Encoders.load(
            EncodersConfig(
                esm2=info.esm2, esm_if1=info.esm_if1, weights_dir=info.weights_dir, dtype=info.encoder_dtype
            ),
            device,
        )
        for encoder, wanted in (
            (encoders.sequence, info.esm2_fingerprint),
            (encoders.structure, info.esm_if1_fingerprint),
        ):
            if encoder.fingerprint != wanted:
                raise assemble.ModelError(
                    f"{type(encoder).__name__} has other weights (sha256 {encoder.fingerprint[:12]}) than those that "
                    f"{directory} was trained with ({wanted[:12]}): its answers would mean nothing. Put the file back that "
                    f"{Path(directory) / 'model.json'} names, or train again"
                )
        return cls(model, Prompt(tokenizer, info.template, max_answer_tokens=max_new_tokens), encoders, max_new_tokens)

    def ask(self, protein: Protein, questions: list[str]) -> list[str]:
        """Greedy answers, one for each question; N/A where the model has nothing to say."""
        structure_rows, sequence_rows = self.encoders.encode([protein])
        return answer(
            self.model,
            self.prompt,
            structure_rows[0],
            sequence_rows[0],
            questions,
            max_new_tokens=self.max_new_tokens,
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python launch/chat.py", description="Ask a trained model about a protein.")
    parser.add_argument("--model", required=True, help="directory exported by training: RUN/model")
    parser.add_argument("--structure", required=True, help="PDB, mmCIF or BinaryCIF file, plain or gzipped")
    parser.add_argument("--chain", default="A", help="author chain id, or label:ID for mmCIF's own [A]")
    parser.add_argument("--question", help="asked once; without it a conversation begins")
    parser.add_argument("--max-new-tokens", type=int, default=300, help="longest answer, in tokens [300]")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    transformers.logging.disable_progress_bar()
    try:
        protein = read_entry(args.structure).protein(args.chain)
        assistant = Assistant.load(args.model, max_new_tokens=args.max_new_tokens)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.question is not None:
        print(assistant.ask(protein, [args.question])[0])
        return 0
    print(f"{protein.id}, chain {protein.chain}: {len(protein)} residues, {protein.resolved.sum()} resolved.")
    print("Ask about it; an empty line or Ctrl-D ends.")
    converse(lambda question: assistant.ask(protein, [question])[0])
    return 0


def converse(ask):
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        print(ask(question), flush=True)
