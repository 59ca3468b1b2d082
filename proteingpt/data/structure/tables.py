"""mmCIF and BinaryCIF as one thing: the categories and columns we read, decoded when they are first asked for.

Both come through biotite. Of a text file only the categories named here are parsed, and loops of plain values (atoms,
residues) by one split, which is 4-5 times as fast as a CIF parser. Given up: every column not named here.
"""

import io
import re

import numpy as np
from biotite.structure.io.pdbx import BinaryCIFFile, CIFCategory, CIFColumn

from proteingpt.data.structure.atoms import StructureError, unique

# Beyond any entry of the archive: refused before a damaged or hostile length fills the memory.
MAX_ROWS = 50_000_000

COLUMNS = {
    category: frozenset(columns.split())
    for category, columns in {
        "atom_site": "type_symbol label_atom_id auth_atom_id label_comp_id auth_comp_id label_asym_id auth_asym_id "
        "label_entity_id label_seq_id auth_seq_id pdbx_PDB_ins_code label_alt_id occupancy Cartn_x Cartn_y Cartn_z "
        "B_iso_or_equiv pdbx_PDB_model_num",
        "chem_comp": "id mon_nstd_parent_comp_id",
        "citation": "id year",
        "database_PDB_rev": "date date_original",
        "diffrn_radiation": "pdbx_wavelength pdbx_wavelength_list",
        "diffrn_radiation_wavelength": "wavelength",
        "diffrn_source": "pdbx_wavelength pdbx_wavelength_list",
        "em_3d_reconstruction": "resolution",
        "em_software": "name",
        "entity": "id type formula_weight",
        "entity_poly": "entity_id type pdbx_seq_one_letter_code",
        "entity_poly_seq": "entity_id num mon_id",
        "entity_src_gen": "entity_id pdbx_gene_src_scientific_name",
        "entity_src_nat": "entity_id pdbx_organism_scientific",
        "entry": "id",
        "exptl": "method",
        "ma_data": "id",
        "ma_model_list": "model_id",
        "ma_qa_metric": "name type",
        "ma_target_ref_db_details": "target_entity_id organism_scientific",
        "pdbx_audit_revision_history": "revision_date",
        "pdbx_database_status": "recvd_initial_deposition_date",
        "pdbx_entity_branch": "type",
        "pdbx_entity_src_syn": "entity_id organism_scientific",
        "pdbx_nmr_ensemble": "representative_conformer",
        "pdbx_nmr_representative": "conformer_id",
        "pdbx_nmr_software": "name",
        "pdbx_poly_seq_scheme": "auth_seq_num",
        "pdbx_struct_assembly": "details",
        "pdbx_struct_mod_residue": "label_comp_id parent_comp_id",
        "refine": "ls_d_res_high",
        "software": "name",
        "struct": "title pdbx_structure_determination_methodology",
        "struct_asym": "id entity_id",
        "struct_conn": "conn_type_id ptnr1_label_asym_id ptnr1_label_comp_id ptnr2_label_asym_id ptnr2_label_comp_id",
        "struct_keywords": "pdbx_keywords text",
        "struct_mon_prot_cis": "pdbx_id label_asym_id label_seq_id pdbx_label_asym_id_2 pdbx_label_seq_id_2",
    }.items()
}


class Tables:
    """The categories of one block. name: that of the block.

    Texts are str arrays in which `.` and `?` are the empty string; an absent category or column is None or no rows.
    """

    def __init__(self, name: str, categories: dict):
        self.name = name
        self._categories = categories  # of text files: unparsed until asked for
        self._texts: dict[tuple[str, str], np.ndarray] = {}

    def __contains__(self, category: str) -> bool:
        return category in self._categories

    def _category(self, category: str):
        table = self._categories.get(category)
        if isinstance(table, str):
            table = self._categories[category] = _parse_category(category, table)
        return table

    def num_rows(self, category: str) -> int:
        return 0 if category not in self else self._category(category).row_count

    def column(self, category: str, *names: str):
        """The first of these columns that is there, its length checked; None if there is none."""
        assert COLUMNS[category].issuperset(names), f"{category}: {names} are not all declared in COLUMNS"
        table = self._category(category)
        name = next((n for n in names if table is not None and n in table), None)
        if name is None:
            return None
        column = table[name]
        if len(column) != table.row_count or (column.mask is not None and len(column.mask) != table.row_count):
            raise StructureError(
                f"{category}.{name} has {len(column)} rows, its category {table.row_count}; fetch it again"
            )
        return column

    def texts(self, category: str, *names: str) -> np.ndarray | None:
        key = (category, names[0])
        if key not in self._texts:
            column = self.column(category, *names)
            self._texts[key] = None if column is None else column.as_array(str, masked_value="")
        return self._texts[key]

    def models(self) -> np.ndarray | None:
        """Model number of each atom, as the file's own type (a number or text)."""
        column = self.column("atom_site", "pdbx_PDB_model_num")
        return None if column is None else column.as_array(str if isinstance(column, CIFColumn) else None)

    def num_masked(self, category: str, name: str) -> int | None:
        """How many rows of that column are `.` or `?`."""
        column = self.column(category, name)
        if column is None:
            return None
        return 0 if column.mask is None else int(np.count_nonzero(column.mask.array))

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
        return unique(text for text in texts if text)


def bcif_tables(data: bytes) -> Tables:
    """The first block that holds coordinates."""
    file = BinaryCIFFile.read(io.BytesIO(data))
    for block in file.serialize()["dataBlocks"]:  # nothing is decoded yet: these are the raw maps
        categories = {category["name"].lstrip("_"): category for category in block["categories"]}
        if "atom_site" in categories:
            wanted = COLUMNS.keys() & categories.keys()
            for name in wanted:
                columns = [column for column in categories[name]["columns"] if column["name"] in COLUMNS[name]]
                _check_sizes(categories[name]["rowCount"], columns)
            decoded = file[block["header"]]
            return Tables(block["header"], {name: decoded[name] for name in wanted})
    raise StructureError("no atom_site category; wanted coordinates (if the file was cut short, fetch it again)")


def _check_sizes(num_rows: int, columns: list[dict]) -> None:
    """Refuse announced lengths beyond reason before the decoder allocates them."""
    _check_size("rowCount", num_rows)
    for column in columns:
        for part in (column["data"], column["mask"]):
            _check_encodings(part["encoding"] if part else ())


def _check_encodings(encodings: list[dict]) -> None:
    for encoding in encodings:
        _check_size("srcSize", encoding.get("srcSize", 0))
        _check_encodings(encoding.get("dataEncoding", ()))
        _check_encodings(encoding.get("offsetEncoding", ()))


def _check_size(key: str, size: int) -> None:
    if not 0 <= size <= MAX_ROWS:
        raise StructureError(f"a length beyond reason: {key} is {size}; wanted at most {MAX_ROWS}")


def mmcif_tables(text: str) -> Tables:
    """The first block that holds coordinates."""
    for name, texts in _split_mmcif(text):
        if "atom_site" in texts:
            return Tables(name, dict(texts))
    raise StructureError("no atom_site category; wanted coordinates (if the file was cut short, fetch it again)")


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
        raise StructureError("truncated: the file ends inside a text field; fetch it again")
    _check_ending(text, [start for start, category, _ in starts if category is not None])

    blocks: list[tuple[str, dict[str, str]]] = []
    ends = [start for start, _, _ in starts[1:]] + [len(text)]
    for (start, category, name), end in zip(starts, ends, strict=True):
        if category is None:
            blocks.append((name, {}))
        elif category in COLUMNS:
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
        raise StructureError("truncated: every category is closed by a # line except the last; fetch the file again")


def _parse_category(name: str, text: str) -> CIFCategory:
    try:
        return _fast_loop(name, text) or CIFCategory.deserialize(text)
    except StructureError:
        raise
    except Exception as error:
        raise StructureError(f"category {name} cannot be parsed: {error}; fetch the file again") from error


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
    values = tokens[1 + num_columns :] if num_columns else []
    if name != "atom_site" and (not values or len(values) % num_columns):
        return None
    if not values:
        raise StructureError(f"category {name} has no rows; wanted atoms")
    if len(values) % num_columns:
        raise StructureError(
            f"category {name} ends inside a row: {len(values)} values in rows of {num_columns}; "
            f"the file is cut or damaged, fetch it again"
        )
    columns = {}
    quoted = "'" in body or '"' in body
    for index in range(num_columns):
        column = values[index::num_columns]
        if quoted and not _unquote(column):
            return None
        columns[tokens[1 + index].removeprefix(prefix)] = column
    wanted = {key: CIFColumn(column) for key, column in columns.items() if key in COLUMNS[name]}
    return CIFCategory(wanted, name)


def _unquote(column: list[str]) -> bool:
    """Take the quotes off in place; False if a quoted value has a blank in it, so that the split tore it apart."""
    quoted = {value for value in set(column) if value[0] in "'\""}
    if not all(len(value) > 1 and value[-1] == value[0] for value in quoted):
        return False
    if quoted:
        column[:] = [value[1:-1] if value in quoted else value for value in column]
    return True
