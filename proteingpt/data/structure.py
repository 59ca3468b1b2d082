"""Structure files to proteins: mmCIF, BinaryCIF and PDB format, plain or gzipped, told apart by content.

mmCIF and BinaryCIF share one path over biotite's categories and columns: `label_seq_id` is the index into the deposited
sequence, so gaps, insertion codes and negative numbers need no alignment. PDB format has no such index: SEQRES is
matched with the residues in the coordinates, helped by REMARK 465, chain breaks and residue numbers.
Chosen: first model; one altloc per residue; atoms of zero occupancy keep their coordinates (as fair-esm does).
Given up: assemblies, and conformers other than the one taken.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from biotite.structure.info import amino_acid_names, link_type, nucleotide_names, one_letter_code
from biotite.structure.io.pdb.hybrid36 import decode_hybrid36
from biotite.structure.io.pdbx import BinaryCIFFile, CIFCategory, CIFColumn

from proteingpt.protein import BACKBONE_ATOMS, UNKNOWN_RESIDUE, Facts, Protein

STRUCTURE_SUFFIXES = tuple(
    suffix + packed for suffix in (".cif", ".mmcif", ".pdbx", ".bcif", ".pdb", ".ent") for packed in ("", ".gz")
)

# The name given to the chain that PDB format leaves blank: a chain must have a name to be asked for.
BLANK_CHAIN = "_"
LABEL_PREFIX = "label:"

# Beyond any entry of the archive (the largest have a few million atoms and half a GB of text): refused before a
# damaged or hostile length fills the memory.
MAX_FILE_BYTES = 2 << 30
MAX_ROWS = 50_000_000
MAX_COORDINATE = 1e6

# Beside the twenty: the ambiguous and the rare residues that have a letter of their own in FASTA and in ESM's alphabet.
_LETTERS = dict(
    ALA="A", ARG="R", ASN="N", ASP="D", CYS="C", GLN="Q", GLU="E", GLY="G", HIS="H", ILE="I", LEU="L", LYS="K",
    MET="M", PHE="F", PRO="P", SER="S", THR="T", TRP="W", TYR="Y", VAL="V", SEC="U", PYL="O", ASX="B", GLX="Z",
    UNK=UNKNOWN_RESIDUE,
)  # fmt: skip
_COMPONENTS = {letter: name for name, letter in _LETTERS.items()}


class StructureError(ValueError):
    """A structure file that cannot be used: names the file, what was found and what was wanted."""


@dataclass(frozen=True)
class _Atoms:
    """Atoms of one chain, first model, n of them. residue: int (n,), row of the deposited sequence."""

    residue: np.ndarray
    name: np.ndarray
    component: np.ndarray
    altloc: np.ndarray
    occupancy: np.ndarray
    position: np.ndarray
    b_factor: np.ndarray


@dataclass(frozen=True)
class _Polymer:
    """One polymer chain. label is None in PDB format; components: the deposited residue names, first of each place."""

    chain: str
    label: str | None
    is_peptide: bool
    components: tuple[str, ...]
    atoms: _Atoms


@dataclass(frozen=True)
class Entry:
    """One parsed structure file.

    id: lower case, from the file, or the stem of the file's name where it does not say.
    chains: author ids of the polypeptide chains, in file order. A blank chain id of PDB format is `_`.
    """

    id: str
    facts: Facts
    chains: tuple[str, ...]
    path: Path
    polymers: tuple[_Polymer, ...] = field(repr=False)
    parents: dict[str, frozenset[str]] = field(repr=False)
    plddt_scale: float | None = None

    def protein(self, chain: str = "A") -> Protein:
        """The chain of that author id, or of that mmCIF `label_asym_id` if asked for as `label:B`.

        sequence: the deposited one; a modified residue by its parent, X where it has none or several.
        backbone: float32 (L, 3, 3), angstrom; NaN atom by atom, where that atom was not resolved.
        confidence: float32 (L,), pLDDT / 100 (0 at a residue without coordinates) of a predicted structure, else None.
        Raises StructureError if there is no such chain, it is not a polypeptide, or no residue has all of N, CA, C.
        """
        try:
            polymer = _choose_polymer(self.polymers, chain)
            return self._build(polymer)
        except StructureError as error:
            raise StructureError(f"{self.path}: {error}") from None

    def _build(self, polymer: _Polymer) -> Protein:
        atoms = _one_conformer(polymer.atoms, polymer.components)
        protein = Protein(
            id=self.id,
            chain=polymer.chain,
            sequence="".join(_letter(name, self.parents) for name in polymer.components),
            backbone=_backbone(atoms, len(polymer.components)),
            confidence=_confidence(atoms, len(polymer.components), self.plddt_scale),
        )
        if not protein.resolved.any():
            raise StructureError(
                f"no complete backbone in chain {polymer.chain!r}: none of its {len(protein)} residues has all of "
                f"N, CA and C; wanted at least one"
            )
        return protein


def read_entry(path: str | Path) -> Entry:
    """Parse a file once. Whatever is wrong with the file, or with reading it, is a StructureError that names it."""
    path = Path(path)
    try:
        data = _read_bytes(path)
        kind = _kind(data, path)
        read = {"bcif": _read_bcif, "mmcif": _read_mmcif, "pdb": _read_pdb}[kind]
        return read(data, path)
    except StructureError as error:
        raise StructureError(f"{path}: {error}") from error.__cause__
    except AssertionError:
        raise
    except Exception as error:  # the libraries beneath raise anything on damaged bytes
        raise StructureError(f"{path}: cannot be read as a structure: {type(error).__name__}: {error}") from error


def find_structures(directory: str | Path) -> list[Path]:
    """All structure files under a directory, sorted: flat, or in sub-folders such as the archive's two-letter ones."""
    directory = Path(directory)
    if not directory.is_dir():
        raise StructureError(f"{directory}: not a directory; wanted one that holds structure files")
    return sorted(p for p in directory.rglob("*") if p.name.lower().endswith(STRUCTURE_SUFFIXES) and p.is_file())


# ---------------------------------------------------------------------------------------------- bytes and formats


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_FILE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StructureError(f"damaged or truncated gzip: {error}; fetch the file again") from error
    except OSError as error:
        raise StructureError(f"cannot be opened: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise StructureError(f"more than {MAX_FILE_BYTES} bytes unpacked; no structure is that large")
    if not data.strip():
        raise StructureError("the file is empty")
    return data


_PDB_RECORD = re.compile(
    rb"^(?:HEADER|TITLE |COMPND|SEQRES|REMARK|CRYST1|MODEL |ATOM  |HETATM|EXPDTA|AUTHOR|HELIX |DBREF )", re.MULTILINE
)


def _kind(data: bytes, path: Path) -> str:
    """`bcif`, `mmcif` or `pdb`, by content."""
    is_map = 0x80 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF)  # MessagePack's map markers
    if is_map and b"dataBlocks" in data:
        return "bcif"
    if b"\0" in data:
        if ".bcif" in path.suffixes:
            raise StructureError("binary, but not a whole BinaryCIF: it does not begin with a map that has dataBlocks")
        raise StructureError("binary content that is neither gzip nor BinaryCIF")
    if re.match(rb"(?:\xef\xbb\xbf)?(?:\s|#[^\n]*\n)*data_", data, re.IGNORECASE):
        return "mmcif"
    if _PDB_RECORD.search(data):
        return "pdb"
    raise StructureError("neither mmCIF (no data_ block), BinaryCIF, nor PDB format (no record of it)")


def _decode(data: bytes) -> str:
    """Text with plain line ends. Titles of old files may hold stray bytes: they are replaced, not fatal."""
    text = data.decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _stem(path: Path) -> str:
    name = path.name
    for suffix in sorted(STRUCTURE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)].lower()
    return path.stem.lower()


# ---------------------------------------------------------------------------------- from atoms to a protein's arrays


def _choose_polymer(polymers: tuple[_Polymer, ...], chain: str) -> _Polymer:
    by_label = chain.startswith(LABEL_PREFIX)
    wanted = chain.removeprefix(LABEL_PREFIX)
    if by_label and all(p.label is None for p in polymers):
        raise StructureError(f"chain {chain!r} was asked for, but this file has no label ids; ask by author chain id")
    found = [p for p in polymers if (p.label if by_label else p.chain) == wanted]
    peptides = [p for p in found if p.is_peptide]
    if peptides:
        return peptides[0]
    there = ", ".join(_unique(p.label if by_label else p.chain for p in polymers if p.is_peptide)) or "none"
    if found:
        raise StructureError(f"chain {chain!r} is not a polypeptide; the polypeptide chains are: {there}")
    raise StructureError(f"no polymer chain {chain!r}; the polypeptide chains are: {there}")


def _unique(values: Iterable) -> tuple:
    return tuple(dict.fromkeys(values))


def _letter(component: str, parents: dict[str, frozenset[str]]) -> str:
    """One letter for one residue. The file's own word on the parent comes first, then the component dictionary."""
    if component in _LETTERS:
        return _LETTERS[component]
    of_file = parents.get(component, frozenset())
    if len(of_file) > 1:
        return UNKNOWN_RESIDUE
    return next((_LETTERS[parent] for parent in of_file if parent in _LETTERS), _dictionary_letter(component))


@lru_cache(maxsize=None)
def _dictionary_letter(component: str) -> str:
    """Letter by the wwPDB's Chemical Component Dictionary; X for a chromophore of several residues (`TYG`)."""
    letter = one_letter_code(component) if "PEPTIDE" in (link_type(component) or "").upper() else None
    return letter if letter is not None and len(letter) == 1 else UNKNOWN_RESIDUE


@lru_cache(maxsize=None)
def _is_amino_acid(component: str) -> bool:
    return component in _LETTERS or component in amino_acid_names()


@lru_cache(maxsize=None)
def _is_nucleotide(component: str) -> bool:
    return component in nucleotide_names()


def _is_peptide(components: Iterable[str]) -> bool:
    """Where the file does not say: the larger number of residues decides."""
    components = list(components)
    num_amino = sum(map(_is_amino_acid, components))
    return num_amino > 0 and num_amino >= sum(map(_is_nucleotide, components))


def _backbone_column(atoms: _Atoms) -> np.ndarray:
    """int (n,): 0, 1, 2 for N, CA, C; -1 for any other atom."""
    column = np.full(len(atoms.name), -1)
    for index, name in enumerate(BACKBONE_ATOMS):
        column[atoms.name == name] = index
    return column


def _one_conformer(atoms: _Atoms, components: tuple[str, ...]) -> _Atoms:
    """Keep, at each residue, the atoms of the deposited (first) component and of one altloc, beside those without.

    The altloc is the one that leaves most of N, CA, C in place, then of the largest summed occupancy, then the first in
    the file. Any character but blank is an altloc: in 1K6P they are digits.
    """
    wanted = np.array(components)[atoms.residue]
    keep = np.ones(len(wanted), dtype=bool)
    other = atoms.component != wanted
    for residue in np.unique(atoms.residue[other]):
        here = atoms.residue == residue
        # Where the file lists one component and models only another, what was modelled is all there is.
        if not other[here].all():
            keep[here & other] = False

    column = _backbone_column(atoms)
    alternative = keep & (atoms.altloc != "")
    rows_by_residue: dict[int, list[int]] = {}
    for row in np.flatnonzero(alternative):
        rows_by_residue.setdefault(int(atoms.residue[row]), []).append(row)
    if rows_by_residue:
        common = keep & ~alternative & (column >= 0)
        present = np.zeros((len(components), 3), dtype=bool)
        present[atoms.residue[common], column[common]] = True
        for residue, rows in rows_by_residue.items():
            chosen = _choose_altloc(atoms, column, rows, present[residue])
            keep[[row for row in rows if atoms.altloc[row] != chosen]] = False
    return _take(atoms, keep)


def _choose_altloc(atoms: _Atoms, column: np.ndarray, rows: list[int], present: np.ndarray) -> str:
    by_altloc: dict[str, list[int]] = {}
    for row in rows:
        by_altloc.setdefault(str(atoms.altloc[row]), []).append(row)

    def rank(altloc: str) -> tuple[int, float]:
        own = by_altloc[altloc]
        num_backbone = len({int(c) for c in column[own] if c >= 0} | set(np.flatnonzero(present).tolist()))
        # Rounded, so that sums of the same decimals tie whatever their order.
        return num_backbone, round(float(atoms.occupancy[own].sum(dtype=np.float64)), 4)

    return max(by_altloc, key=rank)  # the first of equals


def _take(atoms: _Atoms, rows: np.ndarray) -> _Atoms:
    return _Atoms(**{name: getattr(atoms, name)[rows] for name in _Atoms.__dataclass_fields__})


def _backbone(atoms: _Atoms, length: int) -> np.ndarray:
    column = _backbone_column(atoms)
    rows = np.flatnonzero(column >= 0)[::-1]  # of two atoms of one name the first in the file is written last
    backbone = np.full((length, 3, 3), np.nan, dtype=np.float32)
    backbone[atoms.residue[rows], column[rows]] = atoms.position[rows]
    return backbone


def _confidence(atoms: _Atoms, length: int, scale: float | None) -> np.ndarray | None:
    if scale is None:
        return None
    rows = np.concatenate([np.flatnonzero(atoms.name != "CA"), np.flatnonzero(atoms.name == "CA")])
    confidence = np.zeros(length, dtype=np.float32)
    confidence[atoms.residue[rows]] = atoms.b_factor[rows] / scale
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise StructureError(
            f"a predicted structure whose B factors go from {atoms.b_factor.min():g} to {atoms.b_factor.max():g}; "
            f"wanted its pLDDT there, in 0 to {scale:g}"
        )
    return confidence


def _check_positions(position: np.ndarray) -> None:
    """Unresolved coordinates are NaN (`?` in mmCIF); infinite or absurd ones are damage."""
    wrong = np.isinf(position) | (np.abs(position) > MAX_COORDINATE)
    if wrong.any():
        raise StructureError(f"coordinate {position[wrong][0]:g} is beyond reason (over {MAX_COORDINATE:g} angstrom)")


# ------------------------------------------------------------------------------------------- mmCIF and BinaryCIF

_CATEGORIES = frozenset(
    "atom_site entity entity_poly entity_poly_seq struct_asym pdbx_poly_seq_scheme entry struct struct_keywords exptl "
    "refine em_3d_reconstruction entity_src_gen entity_src_nat pdbx_entity_src_syn pdbx_database_status "
    "database_PDB_rev pdbx_struct_mod_residue chem_comp ma_qa_metric ma_target_ref_db_details software".split()
)


class _Tables:
    """The categories of one block, under one interface: biotite's columns are the same for mmCIF and BinaryCIF."""

    def __init__(self, categories: dict):
        self.categories = categories

    def column(self, category: str, *names: str):
        """The first of these columns that is there, its length checked; None if there is none."""
        table = self.categories.get(category)
        name = next((n for n in names if table is not None and n in table), None)
        if name is None:
            return None
        column = table[name]
        if len(column) != table.row_count or (column.mask is not None and len(column.mask) != table.row_count):
            raise StructureError(f"{category}.{name} has {len(column)} rows, its category {table.row_count}")
        return column

    def texts(self, category: str, *names: str) -> np.ndarray | None:
        """str (n,): `.` and `?` become the empty string."""
        column = self.column(category, *names)
        return None if column is None else column.as_array(str, masked_value="")

    def numbers(self, category: str, name: str, dtype: type, missing: float) -> np.ndarray | None:
        column = self.column(category, name)
        if column is None:
            return None
        try:
            return column.as_array(dtype, masked_value=missing)
        except (ValueError, OverflowError) as error:
            raise StructureError(f"{category}.{name} holds a broken number: {error}") from error

    def rows(self, category: str, *names: str) -> list[tuple[str, ...]]:
        """Those columns as rows of text; an absent column is empty text, an absent category no rows."""
        columns = [self.texts(category, name) for name in names]
        length = next((len(c) for c in columns if c is not None), 0)
        return list(zip(*([""] * length if c is None else c.tolist() for c in columns), strict=True))

    def values(self, category: str, name: str) -> tuple[str, ...]:
        """The distinct values that are given, in file order, line breaks made spaces."""
        texts = (" ".join(row[0].split()) for row in self.rows(category, name))
        return _unique(text for text in texts if text)


def _read_bcif(data: bytes, path: Path) -> Entry:
    file = BinaryCIFFile.read(io.BytesIO(data))
    for block in file.serialize()["dataBlocks"]:  # nothing is decoded yet: these are the raw maps
        names = {category["name"].lstrip("_") for category in block["categories"]}
        if "atom_site" in names:
            _check_sizes([c for c in block["categories"] if c["name"].lstrip("_") in _CATEGORIES])
            decoded = file[block["header"]]
            return _cif_entry(_Tables({n: decoded[n] for n in names & _CATEGORIES}), block["header"], path)
    raise StructureError("no atom_site category; wanted coordinates")


def _check_sizes(node: object) -> None:
    """Refuse announced lengths beyond reason before the decoder allocates them."""
    if isinstance(node, list):
        for item in node:
            _check_sizes(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("rowCount", "srcSize") and not 0 <= value <= MAX_ROWS:
                raise StructureError(f"a length beyond reason: {key} is {value}; wanted at most {MAX_ROWS}")
            _check_sizes(value)


def _read_mmcif(data: bytes, path: Path) -> Entry:
    blocks = _split_mmcif(_decode(data))
    for name, texts in blocks:
        if "atom_site" in texts:
            return _cif_entry(_Tables({c: _parse_category(c, text) for c, text in texts.items()}), name, path)
    raise StructureError("no atom_site category; wanted coordinates (the file may be cut short)")


_LANDMARK = re.compile(r"^(?:;|[ \t]*(?:loop_|data_(\S*)|save_\S*|_([^\s.]+)\.))", re.MULTILINE | re.IGNORECASE)


def _split_mmcif(text: str) -> list[tuple[str, dict[str, str]]]:
    """Blocks as (name, {category we read: its text}).

    Only lines that can begin something are visited: the rows of atom_site are passed over by the regular expression.
    """
    starts: list[tuple[int, str | None, str]] = []  # offset, category (None: a new block), block name
    in_text, loop, current = False, None, None
    for match in _LANDMARK.finditer(text):
        word = match.group().strip().lower()  # refinement programs indent
        if word == ";":
            in_text = not in_text
        elif in_text:
            continue
        elif word.startswith(("data_", "save_")):
            starts.append((match.start(), None, match.group(1) or ""))
            loop, current = None, None
        elif word == "loop_":
            loop = match.start()
        elif loop is not None or match.group(2) != current:
            current = match.group(2)
            starts.append((match.start() if loop is None else loop, current, ""))
            loop = None
    if in_text:
        raise StructureError("truncated: the file ends inside a text field")
    _check_ending(text, [start for start, category, _ in starts if category is not None])

    blocks: list[tuple[str, dict[str, str]]] = []
    ends = [start for start, _, _ in starts[1:]] + [len(text)]
    for (start, category, name), end in zip(starts, ends, strict=True):
        if category is None:
            blocks.append((name, {}))
        elif category in _CATEGORIES:
            if category in blocks[-1][1]:
                raise StructureError(f"category {category} stands twice in one block; wanted each once")
            blocks[-1][1][category] = text[start:end]
    return blocks


def _check_ending(text: str, starts: list[int]) -> None:
    """The archives close every category with a `#` line: where all others are closed and the last is not, it was cut.

    Eight closed ones show that the writer has that habit; short files written by hand may lack the last.
    """
    closed = [text[max(0, start - 100) : start].rstrip().endswith("#") for start in starts[1:]]
    if len(closed) >= 8 and all(closed) and not text[-100:].rstrip().endswith("#"):
        raise StructureError("truncated: every category is closed by a # line except the last")


def _parse_category(name: str, text: str) -> CIFCategory:
    try:
        return (_fast_loop(name, text) if name == "atom_site" else None) or CIFCategory.deserialize(text)
    except StructureError:
        raise
    except Exception as error:
        raise StructureError(f"category {name} cannot be parsed (cut short?): {error}") from error


def _fast_loop(name: str, text: str) -> CIFCategory | None:
    """A loop without text fields, comments or blanks inside quotes, by one split: 4-5 times as fast as a CIF parser.

    None where the text is not of that simple kind.
    """
    body = text.strip().removesuffix("#")
    if not body[:5].lower() == "loop_" or "\n;" in body or "#" in body:
        return None
    tokens = body.split()
    prefix = f"_{name}."
    num_columns = next((i for i, token in enumerate(tokens[1:]) if not token.startswith(prefix)), 0)
    values = tokens[1 + num_columns :]
    if not values:
        raise StructureError(f"category {name} has no rows; wanted atoms")
    if len(values) % num_columns:
        raise StructureError(
            f"category {name} ends inside a row: {len(values)} values in rows of {num_columns}; "
            f"the file is cut or damaged"
        )
    columns = {}
    quoted = "'" in body or '"' in body
    for index in range(num_columns):
        column = values[index::num_columns]
        if quoted and not _unquote(column):
            return None
        columns[tokens[1 + index].removeprefix(prefix)] = column
    wanted = {key: CIFColumn(column) for key, column in columns.items() if key in _ATOM_COLUMNS}
    return CIFCategory(wanted, name)


def _unquote(column: list[str]) -> bool:
    """Take the quotes off in place; False if a quoted value has a blank in it, so that the split tore it apart."""
    quoted = {value for value in set(column) if value[0] in "'\""}
    if not all(len(value) > 1 and value[-1] == value[0] for value in quoted):
        return False
    if quoted:
        column[:] = [value[1:-1] if value in quoted else value for value in column]
    return True


_ATOM_COLUMNS = frozenset(
    "label_atom_id auth_atom_id label_comp_id auth_comp_id label_asym_id auth_asym_id label_entity_id label_seq_id "
    "auth_seq_id pdbx_PDB_ins_code label_alt_id occupancy Cartn_x Cartn_y Cartn_z B_iso_or_equiv "
    "pdbx_PDB_model_num".split()
)


def _cif_entry(tables: _Tables, block_name: str, path: Path) -> Entry:
    polymers = _cif_polymers(tables)
    ids = tables.values("entry", "id") or ((block_name,) if block_name else ())
    return Entry(
        id=ids[0].lower() if ids else _stem(path),
        facts=_cif_facts(tables, polymers),
        chains=_unique(p.chain for p in polymers if p.is_peptide),
        path=path,
        polymers=polymers,
        parents=_cif_parents(tables),
        plddt_scale=_cif_plddt_scale(tables),
    )


@dataclass(frozen=True)
class _Site:
    """atom_site of the first model, column by column; texts as in the file, empty where it has none."""

    rows: np.ndarray | slice  # of the whole category
    atoms: _Atoms  # residue: label_seq_id, 0 where it has none
    label: np.ndarray
    chain: np.ndarray
    entity: np.ndarray


def _cif_site(tables: _Tables) -> _Site:
    model = tables.texts("atom_site", "pdbx_PDB_model_num")
    num_rows = tables.categories["atom_site"].row_count
    rows = slice(None) if model is None or (model == model[0]).all() else model == model[0]

    def texts(*names: str, wanted: bool = False) -> np.ndarray:
        found = tables.texts("atom_site", *names)
        if found is None and wanted:
            raise StructureError(f"atom_site has no column {' or '.join(names)}")
        return (np.full(num_rows, "") if found is None else found)[rows]

    def numbers(name: str, missing: float, dtype: type = np.float64) -> np.ndarray:
        found = tables.numbers("atom_site", name, dtype, missing)
        return (np.full(num_rows, missing, dtype) if found is None else found)[rows]

    for axis in "xyz":
        if tables.column("atom_site", f"Cartn_{axis}") is None:
            raise StructureError(f"atom_site has no column Cartn_{axis}")
    position = np.stack([numbers(f"Cartn_{axis}", np.nan) for axis in "xyz"], axis=1)
    _check_positions(position)
    atoms = _Atoms(
        residue=numbers("label_seq_id", 0, np.int64),
        name=texts("label_atom_id", "auth_atom_id", wanted=True),
        component=texts("label_comp_id", "auth_comp_id", wanted=True),
        altloc=texts("label_alt_id"),
        occupancy=numbers("occupancy", 1.0),
        position=position.astype(np.float32),
        b_factor=numbers("B_iso_or_equiv", 0.0),
    )
    label, chain = texts("label_asym_id", "auth_asym_id", wanted=True), texts("auth_asym_id", "label_asym_id")
    return _Site(rows, atoms, label, np.where(chain == "", label, chain), texts("label_entity_id"))


def _runs(*columns: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the stretches where none of the columns changes."""
    if len(columns[0]) == 0:
        return []
    changes = np.zeros(len(columns[0]) - 1, dtype=bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _cif_polymers(tables: _Tables) -> tuple[_Polymer, ...]:
    site = _cif_site(tables)
    if not (site.atoms.residue > 0).any():
        return _observed_cif_polymers(tables, site)
    polymer_rows = np.flatnonzero(site.atoms.residue > 0)
    rows_by_label: dict[str, list[np.ndarray]] = {}
    for start, stop in _runs(site.label[polymer_rows]):
        rows_by_label.setdefault(str(site.label[polymer_rows[start]]), []).append(polymer_rows[start:stop])

    entity_of = dict(tables.rows("struct_asym", "id", "entity_id"))
    types = dict(tables.rows("entity_poly", "entity_id", "type"))
    sequences = _deposited_sequences(tables)
    polymers = []
    for label, parts in rows_by_label.items():
        rows = np.concatenate(parts)
        entity = entity_of.get(label) or str(site.entity[rows[0]])
        if types and entity not in types:
            continue  # branched sugars may carry a label_seq_id in old files
        atoms = _take(site.atoms, rows)
        components, residue = _index_residues(label, sequences.get(entity), atoms)
        kind = types.get(entity, "").lower()
        is_peptide = kind.startswith(("polypeptide", "cyclic-pseudo-peptide"))
        if kind in ("", "other"):
            is_peptide = _is_peptide(components)
        atoms = _Atoms(**{**atoms.__dict__, "residue": residue})
        polymers.append(_Polymer(str(site.chain[rows[0]]), label, is_peptide, components, atoms))
    return tuple(polymers)


def _index_residues(
    label: str, deposited: dict[int, str] | None, atoms: _Atoms
) -> tuple[tuple[str, ...], np.ndarray]:
    """Deposited components, and for each atom its row among them. Without a deposited sequence: what was observed."""
    if deposited is None:
        numbers, first = np.unique(atoms.residue, return_index=True)
        return tuple(atoms.component[first].tolist()), np.searchsorted(numbers, atoms.residue)
    numbers = np.array(sorted(deposited))
    residue = np.searchsorted(numbers, atoms.residue).clip(max=len(numbers) - 1)
    strangers = np.unique(atoms.residue[numbers[residue] != atoms.residue])
    if len(strangers):
        raise StructureError(
            f"atom_site places residue {strangers[0]} in chain {label!r} (label_asym_id), whose deposited sequence of "
            f"{len(numbers)} residues has no such number"
        )
    return tuple(deposited[number] for number in numbers.tolist()), residue


def _deposited_sequences(tables: _Tables) -> dict[str, dict[int, str]]:
    """{entity: {number: component}}; of several components at one number (microheterogeneity) the first."""
    sequences: dict[str, dict[int, str]] = {}
    for entity, number, component in tables.rows("entity_poly_seq", "entity_id", "num", "mon_id"):
        if not number.isdecimal():
            raise StructureError(f"entity_poly_seq.num holds {number!r}; wanted a positive number")
        sequences.setdefault(entity, {}).setdefault(int(number), component)
    if sequences:
        return sequences
    for entity, text in tables.rows("entity_poly", "entity_id", "pdbx_seq_one_letter_code"):
        # Not the canonical code: here a modified residue is one name in brackets, so that places can be counted.
        found = re.findall(r"\(([^)]*)\)|(\S)", text)
        if found:
            names = (name or _COMPONENTS.get(letter, "UNK") for name, letter in found)
            sequences[entity] = dict(enumerate(names, start=1))
    return sequences


def _observed_cif_polymers(tables: _Tables, site: _Site) -> tuple[_Polymer, ...]:
    """Files of refinement programs without label_seq_id: the residues of each author chain, as observed."""
    number, code = tables.texts("atom_site", "auth_seq_id"), tables.texts("atom_site", "pdbx_PDB_ins_code")
    if number is None:
        raise StructureError("atom_site has neither label_seq_id nor auth_seq_id; wanted residue numbers")
    key = (number if code is None else np.strings.add(np.strings.add(number, "|"), code))[site.rows]
    polymers = []
    for chain in _unique(site.chain.tolist()):
        rows = np.flatnonzero(site.chain == chain)
        known = {c for c in set(site.atoms.component[rows].tolist()) if _is_amino_acid(c) or _is_nucleotide(c)}
        rows = rows[np.isin(site.atoms.component[rows], sorted(known))]
        if len(rows):
            atoms = _take(site.atoms, rows)
            residue, first = _group_residues(key[rows], atoms.name, atoms.altloc)
            components = tuple(atoms.component[first].tolist())
            atoms = _Atoms(**{**atoms.__dict__, "residue": residue})
            polymers.append(_Polymer(chain, str(site.label[rows[0]]), _is_peptide(components), components, atoms))
    return tuple(polymers)


def _group_residues(key: np.ndarray, name: np.ndarray, altloc: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Residues by their number and insertion code: index for each atom, and the first atom of each residue.

    Atoms of one residue need not be neighbours (altlocs in a later block), but a number that comes back with an atom
    that is already there, outside any altloc, is another residue.
    """
    residue = np.empty(len(key), dtype=np.int64)
    latest: dict[str, int] = {}
    names: list[set[str]] = []
    first: list[int] = []
    for start, stop in _runs(key):
        own = set(name[start:stop][altloc[start:stop] == ""].tolist())
        index = latest.get(str(key[start]))
        if index is None or names[index] & own:
            index = latest[str(key[start])] = len(first)
            first.append(start)
            names.append(set())
        names[index] |= own
        residue[start:stop] = index
    return residue, first


def _cif_parents(tables: _Tables) -> dict[str, frozenset[str]]:
    parents: dict[str, set[str]] = {}
    rows = tables.rows("pdbx_struct_mod_residue", "label_comp_id", "parent_comp_id")
    for component, parent in rows + tables.rows("chem_comp", "id", "mon_nstd_parent_comp_id"):
        parents.setdefault(component, set()).update(re.findall(r"\w+", parent))
    return {component: frozenset(names) for component, names in parents.items()}


def _cif_plddt_scale(tables: _Tables) -> float | None:
    """What the B factors are to be divided by, if they are pLDDT: 100, or 1 for a metric declared as such.

    By the ModelCIF category `ma_qa_metric`; where a program that rewrote the file dropped it, by the id AlphaFold DB
    gave it or by AlphaFold as software. An experimental entry may name AlphaFold too (phasing): it is not a model.
    """
    if any("THEORETICAL" not in method.upper() for method in tables.values("exptl", "method")):
        return None
    metrics = [" ".join(row).lower() for row in tables.rows("ma_qa_metric", "name", "type")]
    plddt = [metric for metric in metrics if "plddt" in metric]
    if plddt:
        return 1.0 if all("[0,1]" in metric for metric in plddt) else 100.0
    is_alphafold = any("alphafold" in name.lower() for name in tables.values("software", "name"))
    is_alphafold |= any(re.fullmatch(r"AF-[\w-]+-F\d+", name) for name in tables.values("entry", "id"))
    return 100.0 if is_alphafold and not metrics else None


def _cif_facts(tables: _Tables, polymers: tuple[_Polymer, ...]) -> Facts:
    keywords = tables.values("struct_keywords", "pdbx_keywords") + tables.values("struct_keywords", "text")
    dates = tables.values("pdbx_database_status", "recvd_initial_deposition_date")
    dates += tables.values("database_PDB_rev", "date_original")
    entities = tables.rows("entity_poly", "entity_id") or [
        row for row in tables.rows("entity", "id", "type") if row[1] == "polymer"
    ]
    return Facts(
        title=next(iter(tables.values("struct", "title")), None),
        keywords=_split_keywords(keywords),
        methods=tables.values("exptl", "method"),
        resolution=_first_resolution(
            tables.values("refine", "ls_d_res_high") + tables.values("em_3d_reconstruction", "resolution")
        ),
        organisms=_cif_organisms(tables),
        year=next((int(date[:4]) for date in dates if re.match(r"\d{4}-", date)), None),
        num_models=_cif_num_models(tables),
        num_chains=len(_unique(p.chain for p in polymers)),
        num_polymer_entities=len(_unique(entities)) or None,
    )


def _cif_num_models(tables: _Tables) -> int:
    model = tables.texts("atom_site", "pdbx_PDB_model_num")
    return 1 if model is None else len({str(model[start]) for start, _ in _runs(model)})


def _split_keywords(texts: Iterable[str]) -> tuple[str, ...]:
    return _unique(word for text in texts for word in (part.strip() for part in text.split(",")) if word)


def _first_resolution(texts: Iterable[str]) -> float | None:
    for text in texts:
        try:
            resolution = round(float(text), 4)  # BinaryCIF may give 2.8000000000000003
        except ValueError:
            continue
        if 0 < resolution < 1000:
            return resolution
    return None


def _cif_organisms(tables: _Tables) -> tuple[str, ...]:
    rows = tables.rows("entity_src_gen", "entity_id", "pdbx_gene_src_scientific_name")
    rows += tables.rows("entity_src_nat", "entity_id", "pdbx_organism_scientific")
    rows += tables.rows("pdbx_entity_src_syn", "entity_id", "organism_scientific")
    rows += tables.rows("ma_target_ref_db_details", "target_entity_id", "organism_scientific")
    # The three ways to be sourced stand in three tables: the entity's number puts them in order again.
    rows.sort(key=lambda row: int(row[0]) if row[0].isdecimal() else 0)
    names = (" ".join(name.split()) for _, name in rows)
    return _unique(name for name in names if name)


# -------------------------------------------------------------------------------------------------------- PDB format


@dataclass(frozen=True)
class _Place:
    """A residue of a PDB-format chain: its component, number (hybrid-36 decoded) and insertion code."""

    component: str
    number: int
    code: str


def _read_pdb(data: bytes, path: Path) -> Entry:
    lines = _decode(data).split("\n")
    records: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith(("ATOM  ", "HETATM", "ANISOU", "CONECT")):
            records.setdefault(line[:6].rstrip(), []).append(line)
    _check_pdb_ending(records)
    remarks = _remarks(records.get("REMARK", []))
    polymers = _pdb_polymers(_pdb_atoms(_first_model(lines)), _seqres(records), _missing_residues(remarks))
    header = records.get("HEADER", [""])[0]
    return Entry(
        id=_pdb_id(header) or _stem(path),
        facts=_pdb_facts(records, remarks, header, polymers),
        chains=_unique(p.chain for p in polymers if p.is_peptide),
        path=path,
        polymers=polymers,
        parents=_pdb_parents(records.get("MODRES", [])),
        plddt_scale=_pdb_plddt_scale(records),
    )


def _check_pdb_ending(records: dict[str, list[str]]) -> None:
    """A file that says it complies with the format ends in END; of others it cannot be told."""
    complies = any(line[6:10].strip() == "4" and "COMPLIES WITH FORMAT" in line for line in records.get("REMARK", []))
    if complies and "END" not in records:
        raise StructureError("truncated: REMARK 4 says it complies with the PDB format, and the END record is missing")


def _pdb_id(header: str) -> str:
    identifier = header[62:66].strip().lower()
    return identifier if re.fullmatch(r"[0-9][0-9a-z]{3}", identifier) else ""


def _remarks(lines: list[str]) -> dict[str, list[str]]:
    remarks: dict[str, list[str]] = {}
    for line in lines:
        remarks.setdefault(line[6:10].strip(), []).append(line[10:].rstrip())
    return remarks


def _first_model(lines: list[str]) -> list[str]:
    """ATOM, HETATM and TER lines up to the first ENDMDL or second MODEL."""
    kept, num_models = [], 0
    for line in lines:
        record = line[:6]
        if record in ("ATOM  ", "HETATM") or record.startswith("TER"):
            kept.append(line)
        elif record.startswith("ENDMDL") and kept:
            break
        elif record.startswith("MODEL "):
            num_models += 1
            if num_models > 1:
                break
    if not any(line.startswith(("ATOM  ", "HETATM")) for line in kept):
        raise StructureError("no ATOM or HETATM record; wanted coordinates (the file may be cut short)")
    return kept


@dataclass(frozen=True)
class _PdbAtoms:
    """Atoms of the first model. serial: line number among them, so that TER can be placed; key: number and code."""

    atoms: _Atoms
    serial: np.ndarray
    chain: np.ndarray
    key: np.ndarray
    is_hetero: np.ndarray
    ends: dict[str, int]  # chain: serial of its last TER


def _pdb_atoms(lines: list[str]) -> _PdbAtoms:
    """Columns as in section 9 of the PDB format guide 3.3, counted from 0 here."""
    serial = np.array([i for i, line in enumerate(lines) if not line.startswith("TER")])
    # One byte a column: what is not ASCII has no place in a coordinate record, and becomes `?`.
    packed = np.array([lines[i][:80].encode("ascii", "replace") for i in serial], dtype="S80")
    table = packed.view("S1").reshape(len(packed), 80)

    def field_(start: int, stop: int) -> np.ndarray:
        # A short line has NULs behind its end; a blank keeps what stands after them from being lost.
        column = table[:, start:stop].copy()
        column[column == b""] = b" "
        return np.strings.strip(column.view(f"S{stop - start}")[:, 0])

    position = np.stack([_pdb_numbers(field_(a, a + 8), "xyz"[i], None) for i, a in enumerate((30, 38, 46))], axis=1)
    _check_positions(position)
    chain = field_(21, 22).astype(str)
    chain[chain == ""] = BLANK_CHAIN
    ends: dict[str, int] = {}
    for i, line in enumerate(lines):
        if line.startswith("TER"):  # a bare TER ends the chain of the atom before it
            before = np.searchsorted(serial, i) - 1
            named = line[21:22].strip() or (str(chain[before]) if before >= 0 else BLANK_CHAIN)
            ends[named] = i
    atoms = _Atoms(
        residue=np.zeros(len(serial), dtype=np.int64),
        name=field_(12, 16).astype(str),
        component=field_(17, 20).astype(str),
        altloc=field_(16, 17).astype(str),
        occupancy=_pdb_numbers(field_(54, 60), "occupancy", 1.0),
        position=position.astype(np.float32),
        b_factor=_pdb_numbers(field_(60, 66), "B factor", 0.0),
    )
    key = np.strings.add(np.strings.add(field_(22, 26), b"|"), field_(26, 27)).astype(str)
    return _PdbAtoms(atoms, serial, chain, key, table[:, 0] == b"H", ends)


def _pdb_numbers(texts: np.ndarray, what: str, missing: float | None) -> np.ndarray:
    if missing is not None:
        texts = np.where(texts == b"", str(missing).encode(), texts)
    try:
        numbers = texts.astype(np.float64)
    except ValueError as error:
        raise StructureError(f"broken number for {what} in a coordinate record: {error}") from error
    if not np.isfinite(numbers).all():
        raise StructureError(f"{what} is {numbers[~np.isfinite(numbers)][0]} in a coordinate record; wanted a number")
    return numbers


def _seqres(records: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """{chain: components}, its announced length checked."""
    names: dict[str, list[str]] = {}
    announced: dict[str, str] = {}
    for line in records.get("SEQRES", []):
        chain = line[11:12].strip() or BLANK_CHAIN
        names.setdefault(chain, []).extend(line[19:70].split())
        announced[chain] = line[13:17].strip()
    for chain, found in names.items():
        if announced[chain] != str(len(found)):
            raise StructureError(
                f"SEQRES of chain {chain!r} announces {announced[chain] or 'no number of'} residues "
                f"and lists {len(found)}"
            )
    return {chain: tuple(found) for chain, found in names.items()}


def _missing_residues(remarks: dict[str, list[str]]) -> dict[str, list[_Place]]:
    """REMARK 465: {chain: residues that were not located}, in the order of the chain, each once."""
    missing: dict[str, dict[_Place, None]] = {}
    pattern = re.compile(r"\s*(?:\d+\s+)?(\S{1,3})\s+(\S)\s+(-?\d+)([A-Za-z]?)\s*$")
    for text in remarks.get("465", []):
        match = pattern.match(text)
        if match:
            component, chain, number, code = match.groups()
            missing.setdefault(chain, {})[_Place(component, int(number), code)] = None
    return {chain: list(places) for chain, places in missing.items()}


def _pdb_polymers(
    table: _PdbAtoms, seqres: dict[str, tuple[str, ...]], missing: dict[str, list[_Place]]
) -> tuple[_Polymer, ...]:
    polymers = []
    for chain in _unique([*seqres, *table.chain.tolist()]):
        deposited = seqres.get(chain)
        rows = _polymer_rows(table, chain, deposited)
        if deposited is None and not len(rows):
            continue
        atoms = _take(table.atoms, rows)
        residue, first = _group_residues(table.key[rows], atoms.name, atoms.altloc)
        observed = [_place(str(atoms.component[i]), str(table.key[rows[i]])) for i in first]
        components = tuple(place.component for place in observed)
        if deposited is None and not _is_peptide(components) and not any(map(_is_nucleotide, components)):
            continue
        atoms = _Atoms(**{**atoms.__dict__, "residue": residue})
        if deposited is not None:
            # Only a protein needs its coordinates placed: a nucleic chain is named and refused.
            row_of = np.full(len(observed), -1)
            if _is_peptide(deposited):
                bonded = _bonds(atoms, len(observed))
                row_of = _place_residues(chain, observed, bonded, deposited, missing.get(chain, []))
            placed = row_of[residue]
            atoms = _take(_Atoms(**{**atoms.__dict__, "residue": placed}), placed >= 0)
            components = deposited
        polymers.append(_Polymer(chain, None, _is_peptide(components), components, atoms))
    return tuple(polymers)


def _polymer_rows(table: _PdbAtoms, chain: str, deposited: tuple[str, ...] | None) -> np.ndarray:
    """Atoms of a chain that belong to its polymer: before its TER, and of a component that can be in it."""
    rows = np.flatnonzero(table.chain == chain)
    if chain in table.ends and (table.serial[rows] < table.ends[chain]).any():
        rows = rows[table.serial[rows] < table.ends[chain]]
    component = table.atoms.component[rows]
    listed = set(deposited or ())
    known = [c for c in set(component.tolist()) if c in listed or _is_amino_acid(c) or _is_nucleotide(c)]
    # Modified residues are HETATM; an unknown name on an ATOM record is taken for a residue, on HETATM for a ligand.
    return rows[np.isin(component, known) | (~table.is_hetero[rows] & (deposited is None))]


def _place(component: str, key: str) -> _Place:
    text, code = key.rsplit("|", 1)
    if re.fullmatch(r"[-+]?\d+", text):
        return _Place(component, int(text), code)
    if not re.fullmatch(r"[A-Z][0-9A-Z]{3}|[a-z][0-9a-z]{3}", text):
        raise StructureError(f"residue number {text!r} of {component} is neither decimal nor hybrid-36")
    return _Place(component, decode_hybrid36(text), code)


def _bonds(atoms: _Atoms, num_residues: int) -> np.ndarray:
    """float (num_residues,): 1 where residue i is bonded to the one before it, 0 where not, NaN where unknown.

    C-N below 2.5 angstrom (a peptide bond is 1.33), else CA-CA below 4.5 (3.8 trans, 2.9 cis).
    """
    backbone = _backbone(atoms, num_residues)
    bonded = np.full(num_residues, np.nan)
    for before, after, limit in ((1, 1, 4.5), (2, 0, 2.5)):
        distance = np.linalg.norm(backbone[1:, after] - backbone[:-1, before], axis=1)
        bonded[1:] = np.where(np.isnan(distance), bonded[1:], distance < limit)
    return bonded


def _place_residues(
    chain: str, observed: list[_Place], bonded: np.ndarray, deposited: tuple[str, ...], missing: list[_Place]
) -> np.ndarray:
    """int (num_observed,): row of each observed residue in the deposited sequence, -1 for one that is no part of it."""
    if tuple(place.component for place in observed) == deposited:
        return np.arange(len(observed))
    rows = _merge(observed, bonded, deposited, missing)
    return _embed(chain, observed, bonded, deposited) if rows is None else rows


def _merge(
    observed: list[_Place], bonded: np.ndarray, deposited: tuple[str, ...], missing: list[_Place]
) -> np.ndarray | None:
    """Observed and missing residues shuffled together so that they spell SEQRES; None if they cannot."""
    if len(observed) + len(missing) != len(deposited):
        return None
    rows: list[int] = []
    for row, component in enumerate(deposited):
        taken = row - len(rows)
        seen = observed[len(rows)] if len(rows) < len(observed) else None
        gone = missing[taken] if taken < len(missing) else None
        seen_fits, gone_fits = seen is not None and seen.component == component, gone is not None
        gone_fits = gone_fits and gone.component == component
        if seen_fits and gone_fits:
            follows = bool(rows) and rows[-1] == row - 1 and bonded[len(rows)] == 1
            seen_fits = follows or (seen.number, seen.code) <= (gone.number, gone.code)
        if seen_fits:
            rows.append(row)
        elif not gone_fits:
            return None
    return np.array(rows, dtype=np.int64)


# Costs of the alignment below, in units of an unexplained chain break. A letter may differ (a conflict, a
# microheterogeneity) where the rest agrees, a bonded pair is never torn for that, and numbering only decides ties.
_MISMATCH, _SAME_LETTER, _SKIP = 10.0, 1.0, 15.0
_TORN_BOND, _BREAK, _NO_BREAK = 20.0, 2.0, 1.0
_NUMBERING = 1.5


def _embed(chain: str, observed: list[_Place], bonded: np.ndarray, deposited: tuple[str, ...]) -> np.ndarray:
    """Cheapest order-preserving placement of the observed residues in the deposited sequence (dynamic programming).

    best[p]: least cost so far with the last residue placed at position p, counted from 1; p = 0: none placed yet.
    """
    length = len(deposited)
    names = np.array(deposited)
    letters = np.array([_letter(name, {}) for name in deposited])
    best = np.full(length + 1, np.inf)
    best[0] = 0.0
    origin = np.full((len(observed), length + 1), -1, dtype=np.int32)  # -1: the residue is skipped
    positions = np.arange(length + 1)
    for index, place in enumerate(observed):
        letter = _letter(place.component, {})
        cost = np.where((letters == letter) & (letter != UNKNOWN_RESIDUE), _SAME_LETTER, _MISMATCH)
        cost[names == place.component] = 0.0
        torn = {1.0: _TORN_BOND}.get(bonded[index], _BREAK)
        step = place.number - observed[index - 1].number if index else 0

        # From the residue before, p - 1: free if bonded or unknown.
        arrive = np.full(length + 1, np.inf)
        arrive[1:] = best[:-1] + (_NO_BREAK if bonded[index] == 0 else 0.0) - (_NUMBERING if step == 1 else 0.0)
        arrive[1] = min(arrive[1], best[0])
        source = positions - 1
        # From anywhere before that: the cheapest, by a running minimum; the start of the chain costs nothing.
        running = np.minimum.accumulate(best + np.where(positions > 0, torn, 0.0))
        where = np.maximum.accumulate(np.where(best + np.where(positions > 0, torn, 0.0) == running, positions, 0))
        _improve(arrive, source, 2, running[:-2], where[:-2])
        if 1 < step < length:  # from exactly as far away as the numbers say
            _improve(arrive, source, step + 1, best[1:-step] + torn - _NUMBERING, positions[1:-step])

        skipped = best + _SKIP
        placed = np.full(length + 1, np.inf)
        placed[1:] = arrive[1:] + cost
        origin[index] = np.where(placed <= skipped, source, -1)
        best = np.minimum(placed, skipped)
    rows = _trace(origin, int(best.argmin()))
    _check_placement(chain, observed, deposited, rows)
    return rows


def _improve(arrive: np.ndarray, source: np.ndarray, start: int, cost: np.ndarray, origin: np.ndarray) -> None:
    better = cost < arrive[start:]
    arrive[start:][better] = cost[better]
    source[start:][better] = origin[better]


def _trace(origin: np.ndarray, position: int) -> np.ndarray:
    rows = np.full(len(origin), -1, dtype=np.int64)
    for index in range(len(origin) - 1, -1, -1):
        before = origin[index, position]
        if before >= 0:
            rows[index] = position - 1
            position = int(before)
    return rows


def _check_placement(chain: str, observed: list[_Place], deposited: tuple[str, ...], rows: np.ndarray) -> None:
    wrong = [
        place
        for place, row in zip(observed, rows.tolist(), strict=True)
        if row < 0 or deposited[row] != place.component and _letter(deposited[row], {}) != _letter(place.component, {})
    ]
    if len(wrong) > max(2, len(observed) // 10):
        first = wrong[0]
        raise StructureError(
            f"SEQRES of chain {chain!r} ({len(deposited)} residues) does not fit its coordinates: {len(wrong)} of "
            f"{len(observed)} observed residues have no place in it, the first is {first.component} "
            f"{first.number}{first.code}"
        )


def _pdb_parents(lines: list[str]) -> dict[str, frozenset[str]]:
    parents: dict[str, set[str]] = {}
    for line in lines:
        if line[24:27].strip():
            parents.setdefault(line[12:15].strip(), set()).add(line[24:27].strip())
    return {component: frozenset(names) for component, names in parents.items()}


def _pdb_plddt_scale(records: dict[str, list[str]]) -> float | None:
    """Only a model: an experimental entry may name AlphaFold where it says how it was phased."""
    method = _joined(records, "EXPDTA").upper()
    if method and "THEORETICAL" not in method:
        return None
    lines = (line for record in ("HEADER", "TITLE", "COMPND", "REMARK") for line in records.get(record, []))
    return 100.0 if any("ALPHAFOLD" in line.upper() for line in lines) else None


def _joined(records: dict[str, list[str]], record: str) -> str:
    """A record's text over its continuation lines. A line that ends in a hyphen goes on without a blank."""
    text = ""
    for line in records.get(record, []):
        piece = " ".join(line[10:80].split())
        text += piece if not text or text.endswith("-") else " " + piece
    return text.strip()


def _tagged(text: str, tag: str) -> tuple[str, ...]:
    """Values of `TAG: value;` in COMPND and SOURCE."""
    return _unique(value.strip() for value in re.findall(rf"(?:^|;)\s*{tag}:\s*([^;]*)", text) if value.strip())


def _pdb_facts(
    records: dict[str, list[str]], remarks: dict[str, list[str]], header: str, polymers: tuple[_Polymer, ...]
) -> Facts:
    year = re.fullmatch(r"\d\d-[A-Z]{3}-(\d\d)", header[50:59].strip().upper())
    resolution = (re.search(r"RESOLUTION\.\s+([\d.]+)\s+ANGSTROM", text) for text in remarks.get("2", []))
    methods = (method.strip() for method in _joined(records, "EXPDTA").split(";"))
    return Facts(
        title=_joined(records, "TITLE") or None,
        keywords=_split_keywords([header[10:50].strip(), _joined(records, "KEYWDS")]),
        methods=_unique(method for method in methods if method),
        resolution=_first_resolution(match.group(1) for match in resolution if match),
        organisms=_tagged(_joined(records, "SOURCE"), "ORGANISM_SCIENTIFIC"),
        # The archive began in 1971: two digits below that are of this century.
        year=int(year.group(1)) + (1900 if int(year.group(1)) >= 71 else 2000) if year else None,
        num_models=max(1, len(records.get("MODEL", []))),
        num_chains=len(polymers),
        num_polymer_entities=len(_tagged(_joined(records, "COMPND"), "MOL_ID")) or None,
    )
