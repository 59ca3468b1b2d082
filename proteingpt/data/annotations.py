"""What RCSB publishes of its entries, read: the Data API's JSON becomes Facts and Annotations, cluster files numbers.

Pure, but for `read_annotations`, which reads a folder of such JSON: a client's cache, or any mirror. The query stands
here too, since it must ask for just what is read. Given up: fields of the API that no question is made from.
"""

import itertools
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from proteingpt.data.plain_text import plain_text
from proteingpt.data.structure.fact_texts import DAY, split_keywords
from proteingpt.protein import Facts, short_id

_ENTRY_ID = re.compile(r"[0-9a-z]{4}|pdb_[0-9a-z]{8}")
_CLUSTER_MEMBER = re.compile(r"(?:[0-9A-Z]{4}|PDB_[0-9A-Z]{8})_[0-9]+", re.IGNORECASE)

# How the counts of Facts are called in RCSB's `rcsb_entry_info`. GraphQL writes DNA and RNA, REST dna and rna.
COUNTS = dict(
    num_models=("deposited_model_count",),
    num_assemblies=("assembly_count",),
    num_chains=("deposited_polymer_entity_instance_count",),
    num_entities=("entity_count",),
    num_polymer_entities=("polymer_entity_count",),
    num_nonpolymer_entities=("nonpolymer_entity_count",),
    num_branched_entities=("branched_entity_count",),
    num_solvent_entities=("solvent_entity_count",),
    num_dna_entities=("polymer_entity_count_DNA", "polymer_entity_count_dna"),
    num_rna_entities=("polymer_entity_count_RNA", "polymer_entity_count_rna"),
    num_hybrid_entities=("polymer_entity_count_nucleic_acid_hybrid",),
    num_nucleic_acid_entities=("polymer_entity_count_nucleic_acid",),
    num_heavy_atoms=("deposited_atom_count",),
    num_hydrogen_atoms=("deposited_hydrogen_atom_count",),
    num_solvent_atoms=("deposited_solvent_atom_count",),
    num_polymer_monomers=("deposited_polymer_monomer_count",),
    num_unmodeled_monomers=("deposited_unmodeled_polymer_monomer_count",),
    num_covalent_bonds=("inter_mol_covalent_bond_count",),
    num_metal_bonds=("inter_mol_metalic_bond_count",),
    num_cis_peptides=("cis_peptide_count",),
)

ENTRY_QUERY = f"""query entries($ids: [String!]!) {{
  entries(entry_ids: $ids) {{
    rcsb_id
    struct {{ title }}
    struct_keywords {{ pdbx_keywords text }}
    exptl {{ method }}
    rcsb_accession_info {{ deposit_date initial_release_date }}
    rcsb_primary_citation {{ year }}
    pubmed {{ rcsb_pubmed_abstract_text }}
    rcsb_entry_info {{
      {" ".join(names[0] for names in COUNTS.values())}
      resolution_combined diffrn_radiation_wavelength_maximum structure_determination_methodology
      software_programs_combined molecular_weight polymer_composition selected_polymer_entity_types
      na_polymer_entity_types nonpolymer_bound_components
    }}
    polymer_entities {{
      rcsb_polymer_entity_container_identifiers {{ entity_id auth_asym_ids }}
      rcsb_entity_source_organism {{ ncbi_scientific_name scientific_name }}
    }}
  }}
}}"""


class AnnotationError(ValueError):
    """A mirror of annotations, or an answer, that is not in the form of RCSB's Data API."""


@dataclass(frozen=True)
class Annotation:
    """What RCSB says of an entry.

    abstract: of the primary citation, as plain text on one line.
    release_date: day of the first release, `2001-05-23`.
    polymer_entities: {author chain id: entity id}, of all polymers; `1ABC_` + entity id is the name in cluster files.
    """

    facts: Facts
    abstract: str | None
    release_date: str | None
    polymer_entities: dict[str, str]


def annotation_from_rcsb(entry: dict) -> Annotation:
    """The Data API's answer about one entry, in our types. Raises AnnotationError where it is not in its schema."""
    date = _text(_object(entry, "rcsb_accession_info"), "initial_release_date")
    day = DAY.match(date or "")
    return Annotation(
        facts=facts_from_rcsb(entry),
        abstract=plain_text(_text(_object(entry, "pubmed"), "rcsb_pubmed_abstract_text") or "") or None,
        release_date=day and day[0],
        polymer_entities=_entity_of_chain(entry),
    )


def facts_from_rcsb(entry: dict) -> Facts:
    """Facts from a `CoreEntry` of RCSB's GraphQL schema, or from its REST form (`rest/v1/core/entry`).

    Of several wavelengths it is the longest (RCSB gives the two ends), of several resolutions the first. RCSB leaves
    out a list that is empty: software and bound components are known to be none where `rcsb_entry_info` is there.
    Raises AnnotationError where a value is not of the type the schema gives it.
    """
    info = _object(entry, "rcsb_entry_info")
    keywords = _object(entry, "struct_keywords")
    classification = _text(keywords, "pdbx_keywords")
    methodology = _text(info, "structure_determination_methodology")
    methods = [_text(experiment, "method") for experiment in _objects(entry, "exptl")]
    day = DAY.match(_text(_object(entry, "rcsb_accession_info"), "deposit_date") or "")
    resolutions = _list(info, "resolution_combined") or [None]
    return Facts(
        title=_text(_object(entry, "struct"), "title"),
        keywords=split_keywords(_text(keywords, "text"), classification),
        classification=classification,
        methods=_unique(methods) or None,
        methodology=methodology if methodology in ("experimental", "computational") else None,
        resolution=_number({"resolution_combined": resolutions[0]}, "resolution_combined"),
        wavelength=_number(info, "diffrn_radiation_wavelength_maximum"),
        organisms=_organisms(entry),
        year=int(day[0][:4]) if day else None,
        publication_year=_count(_object(entry, "rcsb_primary_citation"), "year"),
        software=_texts(info, "software_programs_combined"),
        molecular_weight=_number(info, "molecular_weight"),
        polymer_composition=_text(info, "polymer_composition"),
        polymer_type=_text(info, "selected_polymer_entity_types"),
        nucleic_acid_type=_text(info, "na_polymer_entity_types"),
        nonpolymer_components=_texts(info, "nonpolymer_bound_components"),
        **{field: _count(info, *names) for field, names in COUNTS.items()},
    )


def removal_from_rcsb(answer) -> str:
    """The Data API's answer about a removed entry (`rest/v1/holdings/removed`), as a reason why it is not there."""
    removed = _object(answer if isinstance(answer, dict) else {}, "rcsb_repository_holdings_removed")
    day = (_text(removed, "remove_date") or "")[:10]
    successors = ", ".join(str(s).lower() for s in _list(removed, "id_codes_replaced_by"))
    when = f", removed {day}" if day else ""
    return f"obsolete entry{when}" + (f", replaced by {successors}" if successors else "")


def _organisms(entry: dict) -> tuple[str, ...] | None:
    """Scientific names in the order of the entities."""
    sources = [s for e in _objects(entry, "polymer_entities") for s in _objects(e, "rcsb_entity_source_organism")]
    return _unique(_text(s, "ncbi_scientific_name") or _text(s, "scientific_name") for s in sources) or None


def _entity_of_chain(entry: dict) -> dict[str, str]:
    chains: dict[str, str] = {}
    for entity in _objects(entry, "polymer_entities"):
        names = _object(entity, "rcsb_polymer_entity_container_identifiers")
        entity_id = _text(names, "entity_id")
        for chain in _list(names, "auth_asym_ids"):
            if entity_id is not None:
                chains.setdefault(str(chain), entity_id)
    return chains


def _unique(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def _object(parent: dict, name: str) -> dict:
    """A part of the answer; empty where the API has null or nothing."""
    return _typed(parent, name, dict, "an object") or {}


def _objects(parent: dict, name: str) -> list[dict]:
    values = [value for value in _list(parent, name) if value is not None]
    if not all(isinstance(value, dict) for value in values):
        raise AnnotationError(f"{name} is {values!r:.200}, wanted a list of objects")
    return values


def _list(parent: dict, name: str) -> list:
    return _typed(parent, name, list, "a list") or []


def _text(parent: dict, name: str) -> str | None:
    """On one line; None where it is empty."""
    return " ".join((_typed(parent, name, str, "a text") or "").split()) or None


def _texts(info: dict, name: str) -> tuple[str, ...] | None:
    return _unique(str(value) for value in _list(info, name)) if info else None


def _number(parent: dict, name: str) -> float | None:
    value = _typed(parent, name, (int, float), "a number")
    return None if value is None else float(value)


def _count(parent: dict, *names: str) -> int | None:
    """The first of these that is there."""
    return next((value for name in names if (value := _typed(parent, name, int, "an integer")) is not None), None)


def _typed(parent: dict, name: str, kind, wanted: str):
    value = parent.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise AnnotationError(f"{name} is {value!r:.200}, wanted {wanted}")
    return value


def parse_clusters(lines: Iterable[str]) -> dict[str, int]:
    """{`1ABC_1`: number of its cluster}, the number being that of the line, from 0.

    A line is a cluster: names of entities, separated by spaces. Those of computed models (AF_..., MA_...) are left
    out. Raises ValueError on an entity that stands in two clusters.
    """
    clusters: dict[str, int] = {}
    for number, line in enumerate(lines):
        for member in filter(_CLUSTER_MEMBER.fullmatch, line.split()):
            entry, _, entity = member.rpartition("_")
            first = clusters.setdefault(f"{short_id(entry).upper()}_{entity}", number)
            if first != number:
                raise ValueError(f"entity {member} is in the clusters of lines {first + 1} and {number + 1}")
    return clusters


def entry_id(text: str) -> str:
    """The id as the project writes it: lower case, and `pdb_00001abc` by its short form. Raises ValueError."""
    name = short_id(text.strip())
    if not _ENTRY_ID.fullmatch(name):
        raise ValueError(f"{text!r} is not the id of a PDB entry; wanted four letters and digits, or pdb_ and eight")
    return name


def read_annotations(directory: str | Path, broken: dict[str, str] | None = None) -> dict[str, Annotation]:
    """{entry id: its annotation} from a client's cache, or any folder of such files; without network.

    The folder holds one JSON file for each entry, named by its id, flat or in two-letter folders: what the Data API
    answers about one entry (an element of `data.entries`, or `rest/v1/core/entry`). A file that is not, is left out:
    its path and the reason are put into `broken`, or warned about where none is given.
    Raises AnnotationError where there is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AnnotationError(f"{directory}: not a directory; wanted one that holds annotations, as 1abc.json")
    root = directory / "annotations" if (directory / "annotations").is_dir() else directory
    annotations, faults = {}, {}
    for path in sorted(root.rglob("*.json")):
        try:
            name, annotation = read_annotation(path)
            annotations[name] = annotation
        except (OSError, ValueError) as error:
            faults[str(path)] = str(error)
    if broken is not None:
        broken.update(faults)
    elif faults:
        named = "; ".join(f"{path}: {reason}" for path, reason in itertools.islice(faults.items(), 5))
        warnings.warn(f"{len(faults)} annotation(s) left out: {named}", stacklevel=2)
    return annotations


def read_annotation(path: Path) -> tuple[str, Annotation]:
    try:
        entry = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"not JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("rcsb_id"), str):
        raise AnnotationError("no rcsb_id in it: not an entry of RCSB's Data API")
    name = entry_id(entry["rcsb_id"])
    if name != entry_id(path.stem):
        raise AnnotationError(f"it holds entry {name}, wanted {path.stem}, as the file is called")
    return name, annotation_from_rcsb(entry)


def place(folder: Path, name: str, suffix: str) -> Path:
    """PDB's layout: a folder named by the two letters before the last one, `ab/1abc.json`."""
    return folder / name[-3:-1].lower() / f"{name}{suffix}"
