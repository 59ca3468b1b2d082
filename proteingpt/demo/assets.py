"""What the bare command needs and a fresh machine has not: shards, encoders and an LLM, in the formats of real ones."""

import dataclasses
import json
from pathlib import Path

from proteingpt.config import DemoConfig, RunConfig
from proteingpt.data.prompts import TEMPLATES
from proteingpt.data.shards import MANIFEST_NAME, ShardError, remove_shards, replacing, write_shards
from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.demo.proteins import demo_samples
from proteingpt.protein import BACKBONE_ATOMS, Protein

VERSION = 1  # raise it when what is made changes: older assets are then made anew
TEST_SHARE = 0.2
EXAMPLE = "example.pdb"  # a held-out protein as a file, to ask the trained model about

THREE_LETTERS = dict(
    zip(
        "ARNDCQEGHILKMFPSTWYV",
        "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split(),
    )
)


def make_assets(demo: DemoConfig, seed: int) -> bool:
    """Make them in demo.directory unless they are there, made from the same settings. True if they were made.

    `demo.json` is written last, so that what a killed run left is made anew.
    """
    directory = Path(demo.directory)
    settings = {"version": VERSION, "seed": seed, **dataclasses.asdict(demo)}
    done = directory / "demo.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == settings:
        return False
    check_not_foreign(directory)
    directory.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    remove_shards(directory)
    samples = demo_samples(demo.num_proteins, seed)
    write_tiny_esm2(directory / "esm2_demo.pt", seed=seed)
    write_tiny_esm_if1(directory / "esm_if1_demo.pt", seed=seed)
    write_tiny_llm(
        directory / "llm", texts_of(samples), seed=seed, width=demo.llm_width, num_layers=demo.llm_layers
    )
    num_test = round(TEST_SHARE * len(samples))
    splits = {"train": samples[num_test:], "test": samples[:num_test]}
    write_shards(directory, splits, samples_per_shard=100, options={"demo": settings})
    (directory / EXAMPLE).write_text(to_pdb(splits["test"][0].protein), encoding="ascii")
    with replacing(done) as file:
        file.write(json.dumps(settings, indent=1).encode() + b"\n")
    return True


def check_not_foreign(directory: Path):
    """ShardError where other shards than the demo's lie in `directory`: they would be replaced."""
    manifest = directory / MANIFEST_NAME
    if manifest.is_file() and "demo" not in json.loads(manifest.read_text(encoding="utf-8"))["options"]:
        raise ShardError(
            f"demo.directory: {directory} holds shards that are not the demo's, and they would be replaced; give them "
            "as --data DIR, or another --demo.directory"
        )


def texts_of(samples) -> list[str]:
    """What the tokenizer is trained on: the prompts around every question, answer and description."""
    texts = [sample.description for sample in samples]
    for template in {TEMPLATES[key] for key in TEMPLATES if key[1] == "instruct"}:
        end = template.end or ""
        for sample in samples:
            for turn in sample.turns:
                texts.append(template.before + template.after.replace("{question}", turn.question) + turn.answer + end)
    return sorted(texts)


def with_assets(config: RunConfig) -> RunConfig:
    """The recipe with what it leaves open filled in: a user's own shards, LLM or encoders keep their place."""
    directory = Path(config.demo.directory)
    return dataclasses.replace(
        config,
        model=fill(config.model, llm=str(directory / "llm")),
        encoders=fill(
            config.encoders, esm2=str(directory / "esm2_demo.pt"), esm_if1=str(directory / "esm_if1_demo.pt")
        ),
        data=config.data if config.data.mixture else fill(config.data, shards=str(directory)),
    )


def to_pdb(protein: Protein) -> str:
    """The backbone in PDB format, columns as in wwPDB's format guide, version 3.3: SEQRES, and ATOM where resolved."""
    names = [THREE_LETTERS[letter] for letter in protein.sequence]
    lines = [f"{'HEADER':<10}{'SYNTHETIC PROTEIN':<40}22-NOV-26   {protein.id[:4].upper()}"]
    for row, first in enumerate(range(0, len(names), 13), start=1):
        lines.append(f"SEQRES {row:3d} {protein.chain} {len(names):4d}  {' '.join(names[first : first + 13])}")
    serial = 0
    for number, (name, atoms) in enumerate(zip(names, protein.backbone), start=1):
        for atom, (x, y, z) in zip(BACKBONE_ATOMS, atoms):
            if x == x:  # NaN where unresolved
                serial += 1
                lines.append(
                    f"ATOM  {serial:5d}  {atom:<3} {name} {protein.chain}{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
                    f"{1:6.2f}{0:6.2f}          {atom[0]:>2}"
                )
    return "\n".join([*lines, "END", ""])


def fill(section, **values):
    return dataclasses.replace(section, **{k: v for k, v in values.items() if getattr(section, k) is None})
