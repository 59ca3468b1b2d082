"""What the bare command makes for itself: whole, in the real formats, once."""

import dataclasses
import hashlib
from pathlib import Path

import gemmi
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from proteingpt.config import DemoConfig, EncodersConfig, RunConfig, from_dict, read_recipe
from proteingpt.data.shards import ShardError, ShardSet, write_shards
from proteingpt.demo.assets import EXAMPLE, make_assets, to_pdb, with_assets
from proteingpt.demo.proteins import demo_samples
from proteingpt.encoders.pair import Encoders
from proteingpt.protein import Protein

SMALL = DemoConfig(directory="made", num_proteins=10, llm_width=16, llm_layers=1)


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which SMALL was made with seed 3, and what lay there then."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert make_assets(SMALL, seed=3)
    return folder, contents(folder)


@pytest.fixture
def remake(made, monkeypatch):
    monkeypatch.chdir(made[0])
    return lambda demo=SMALL, seed=3: make_assets(demo, seed)


# --------------------------------------------------------------------------------------------------- what is made


def test_a_fifth_of_the_proteins_is_held_out(demo_assets):
    train, test = (ShardSet(demo_assets, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert not set(train.keys) & set(test.keys)
    assert set(train.keys) | set(test.keys) == {f"demo{number:05d}_A" for number in range(20)}


def test_shards_hold_the_demos_samples_whole(demo_assets):
    by_key = {sample.key: sample for sample in demo_samples(20, seed=7)}
    for split in ("train", "test"):
        shards = ShardSet(demo_assets, split)
        shards.verify()
        for i, key in enumerate(shards.keys):
            read, drawn = shards.read(i), by_key[key]
            assert read.turns == drawn.turns and read.description == drawn.description
            assert read.protein.sequence == drawn.protein.sequence
            assert np.array_equal(read.protein.backbone, drawn.protein.backbone, equal_nan=True)


def test_encoders_and_llm_load_as_real_ones_do(demo_assets):
    config = EncodersConfig(
        esm2=str(demo_assets / "esm2_demo.pt"), esm_if1=str(demo_assets / "esm_if1_demo.pt"), dtype="float32"
    )
    protein = ShardSet(demo_assets, "test").read(0).protein
    structure, sequence = Encoders.load(config, "cpu").encode([protein])
    assert len(structure[0]) == len(sequence[0]) == len(protein) + 2
    llm = AutoModelForCausalLM.from_pretrained(demo_assets / "llm", local_files_only=True)
    assert (llm.config.hidden_size, llm.config.num_hidden_layers) == (32, 2)


def test_the_example_is_a_held_out_protein_as_an_independent_reader_sees_it(demo_assets):
    protein = ShardSet(demo_assets, "test").read(0).protein
    same_as_gemmi_reads(demo_assets / EXAMPLE, protein)


def test_unresolved_residues_are_in_seqres_and_not_among_the_atoms(tmp_path):
    proteins = [sample.protein for sample in demo_samples(60, seed=7)]
    gapped = next(p for p in proteins if not p.resolved.all() and len(p) > 40)
    (tmp_path / "gapped.pdb").write_text(to_pdb(gapped))
    same_as_gemmi_reads(tmp_path / "gapped.pdb", gapped)


def same_as_gemmi_reads(path: Path, protein: Protein):
    structure = gemmi.read_structure(str(path))
    structure.setup_entities()
    assert structure.info["_entry.id"].lower() == protein.id[:4]
    assert len(structure) == 1 and [chain.name for chain in structure[0]] == [protein.chain]
    names = structure.entities[0].full_sequence
    assert "".join(gemmi.find_tabulated_residue(name).one_letter_code for name in names) == protein.sequence
    chain = structure[0][0]
    assert [residue.seqid.num for residue in chain] == (np.flatnonzero(protein.resolved) + 1).tolist()
    for residue in chain:
        number = residue.seqid.num - 1
        assert gemmi.find_tabulated_residue(residue.name).one_letter_code == protein.sequence[number]
        assert [(atom.name, atom.element.name) for atom in residue] == [("N", "N"), ("CA", "C"), ("C", "C")]
        read = np.array([atom.pos.tolist() for atom in residue])
        assert np.abs(read - protein.backbone[number]).max() <= 0.000501  # three decimals


# ------------------------------------------------------------------------------------------- made once, and whole


def test_what_is_there_is_left_as_it_is(made, remake):
    assert remake() is False
    assert contents(made[0]) == made[1]


def test_the_same_settings_make_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_assets(SMALL, seed=3)
    assert contents(tmp_path) == made[1]


def test_what_a_killed_run_left_is_made_anew(made, remake):
    """The mark is written last: without it nothing that lies there is trusted."""
    directory = made[0] / "made"
    (directory / "demo.json").unlink()
    (directory / "train-00000.tar").write_bytes(b"half of a shard")
    (directory / "manifest.json").unlink()
    (directory / "esm2_demo.pt").write_bytes(b"half of a checkpoint")
    assert remake() is True
    assert contents(made[0]) == made[1]


def test_a_run_killed_while_it_made_other_settings_leaves_no_mark_of_the_old_ones(made, remake, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("proteingpt.demo.assets.write_tiny_llm", killed)
        with pytest.raises(KeyboardInterrupt):
            remake(seed=4)
    assert remake() is True  # seed 3 again: its encoders have been overwritten
    assert contents(made[0]) == made[1]


@pytest.mark.parametrize("changed, seed", [({"num_proteins": 11}, 3), ({"llm_width": 24}, 3), ({}, 4)])
def test_other_settings_are_made_anew(made, remake, changed, seed):
    assert remake(dataclasses.replace(SMALL, **changed), seed) is True
    assert contents(made[0]) != made[1]
    assert len(ShardSet("made", "train")) + len(ShardSet("made", "test")) == changed.get("num_proteins", 10)
    assert remake() is True and contents(made[0]) == made[1]


def test_shards_that_are_not_the_demos_are_never_replaced(tmp_path):
    samples = demo_samples(2, seed=1)
    write_shards(tmp_path, {"train": samples}, samples_per_shard=10, options={"structures": "demo"})
    before = contents(tmp_path)
    with pytest.raises(ShardError, match="not the demo's"):
        make_assets(dataclasses.replace(SMALL, directory=str(tmp_path)), seed=3)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------ filling a recipe


def test_a_recipe_gets_what_it_leaves_open():
    config = with_assets(from_dict(RunConfig, read_recipe("demo")))
    assert config.data.shards == "shards/demo" and config.model.llm == "shards/demo/llm"
    assert config.encoders.esm2 == "shards/demo/esm2_demo.pt"
    assert config.encoders.esm_if1 == "shards/demo/esm_if1_demo.pt"


def test_what_the_user_gives_keeps_its_place():
    values = read_recipe("demo")
    values["model"]["llm"], values["data"] = "my/llm", {"shards": "my/shards"}
    config = with_assets(from_dict(RunConfig, values))
    assert (config.model.llm, config.data.shards) == ("my/llm", "my/shards")
    assert config.encoders.esm2 == "shards/demo/esm2_demo.pt"
    assert config.model.train == "full" and config.align == from_dict(RunConfig, values).align
