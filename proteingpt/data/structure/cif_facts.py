"""Facts from the categories of mmCIF and BinaryCIF, by the rules RCSB loads `rcsb_entry_info` with.

Source of the rules: py-rcsb_utils_dictionary, `addEntryInfo` and what it calls. Where they take the absence of a
category for zero (no `struct_conn`, no bonds), we do so only in a file that has `pdbx_database_status`, the sign of a
whole entry; what a program left out of its output stays unknown.
"""

import re

import numpy as np

from proteingpt.data.structure.atoms import unique
from proteingpt.data.structure.composition import composition, count_kinds, nucleic_acid_type, polymer_type
from proteingpt.data.structure.fact_texts import (
    DAY,
    HYDROGENS,
    WATERS,
    first_resolution,
    methodology_of,
    positive_numbers,
    split_keywords,
)
from proteingpt.data.structure.tables import Tables
from proteingpt.protein import Facts

# Candidates for the biological assembly; the others are frames and parts of one (`icosahedral pentamer`).
_ASSEMBLIES = frozenset(
    (
        "author_and_software_defined_assembly",
        "author_defined_assembly",
        "software_defined_assembly",
        "complete icosahedral assembly",
        "complete point assembly",
        "representative helical assembly",
    )
)


def cif_facts(tables: Tables, chains: tuple[str, ...], is_predicted: bool) -> Facts:
    """chains: author ids of the polymer chains. is_predicted: the B factors are known to be pLDDT."""
    classification = _first(tables, "struct_keywords", "pdbx_keywords")
    methods = tables.values("exptl", "method")
    return Facts(
        title=_first(tables, "struct", "title"),
        keywords=split_keywords(_first(tables, "struct_keywords", "text"), classification),
        classification=classification,
        methods=methods or None,
        methodology=_methodology(tables, methods, is_predicted),
        resolution=first_resolution(
            tables.values("refine", "ls_d_res_high") + tables.values("em_3d_reconstruction", "resolution")
        ),
        wavelength=_wavelength(tables),
        organisms=_organisms(tables) or None,
        year=_year(tables),
        publication_year=_publication_year(tables),
        software=_software(tables),
        molecular_weight=_molecular_weight(tables),
        num_chains=len(chains),
        num_assemblies=_num_assemblies(tables),
        num_polymer_monomers=tables.num_rows("pdbx_poly_seq_scheme") or None,
        num_unmodeled_monomers=tables.num_masked("pdbx_poly_seq_scheme", "auth_seq_num"),
        num_cis_peptides=_num_cis_peptides(tables),
        **_entity_facts(tables),
        **_polymer_facts(tables),
        **_atom_facts(tables, methods),
        **_bond_facts(tables),
    )


def _first(tables: Tables, category: str, name: str) -> str | None:
    return next(iter(tables.values(category, name)), None)


def _is_whole(tables: Tables) -> bool:
    return "pdbx_database_status" in tables


def _methodology(tables: Tables, methods: tuple[str, ...], is_predicted: bool) -> str | None:
    stated = _first(tables, "struct", "pdbx_structure_determination_methodology")
    if stated in ("experimental", "computational"):
        return stated
    return methodology_of(methods, is_predicted or "ma_data" in tables or "ma_model_list" in tables)


def _wavelength(tables: Tables) -> float | None:
    """The longest of all that are stated. Several are mostly those of a MAD experiment.

    The published answers have one, and do not say which. Where it lies at the edge of zinc (2HVV 1.2835) or of iron
    (1NYK 1.7415) it is the inflection point, the longest of the usual three: hence the choice.
    """
    texts = list(tables.values("diffrn_radiation_wavelength", "wavelength"))
    for category in ("diffrn_radiation", "diffrn_source"):
        for name in ("pdbx_wavelength", "pdbx_wavelength_list"):
            texts += [part for text in tables.values(category, name) for part in text.split(",")]
    return max(positive_numbers(texts), default=None)


def _organisms(tables: Tables) -> tuple[str, ...]:
    rows = tables.rows("entity_src_gen", "entity_id", "pdbx_gene_src_scientific_name")
    rows += tables.rows("entity_src_nat", "entity_id", "pdbx_organism_scientific")
    rows += tables.rows("pdbx_entity_src_syn", "entity_id", "organism_scientific")
    rows += tables.rows("ma_target_ref_db_details", "target_entity_id", "organism_scientific")
    # The three ways to be sourced stand in three tables: the entity's number puts them in order again.
    rows.sort(key=lambda row: int(row[0]) if row[0].isdecimal() else 0)
    names = (" ".join(name.split()) for _, name in rows)
    return unique(name for name in names if name)


def _year(tables: Tables) -> int | None:
    dates = tables.values("pdbx_database_status", "recvd_initial_deposition_date")
    dates += tables.values("database_PDB_rev", "date_original")
    return next((int(date[:4]) for date in dates if re.match(r"\d{4}-", date)), None)


def release_day(tables: Tables) -> str | None:
    """ISO day of the first release: of the first revision, in either of the categories that have listed them."""
    dates = tables.values("pdbx_audit_revision_history", "revision_date") + tables.values("database_PDB_rev", "date")
    return min((date[:10] for date in dates if DAY.match(date)), default=None)


def _publication_year(tables: Tables) -> int | None:
    years = (year for name, year in tables.rows("citation", "id", "year") if name.lower() == "primary")
    return next((int(year) for year in years if re.fullmatch(r"\d{4}", year)), None)


def _software(tables: Tables) -> tuple[str, ...] | None:
    categories = [name for name in ("software", "pdbx_nmr_software", "em_software") if name in tables]
    names = {name.upper() for category in categories for name in tables.values(category, "name")}
    return tuple(sorted(names)) if categories else None


def _molecular_weight(tables: Tables) -> float | None:
    """kDa: the formula weights of every instance of every entity but water. That of an unknown atom counts as zero."""
    weights = {
        entity: sum(positive_numbers([weight]))
        for entity, kind, weight in tables.rows("entity", "id", "type", "formula_weight")
        if kind != "water"
    }
    total = sum(weights.get(row[0], 0.0) for row in tables.rows("struct_asym", "entity_id"))
    return round(total / 1000, 2) if total else None


def _num_assemblies(tables: Tables) -> int | None:
    """Of a whole entry that defines none, the deposited coordinates are the one."""
    if "pdbx_struct_assembly" not in tables:
        return 1 if _is_whole(tables) else None
    return sum(row[0] in _ASSEMBLIES for row in tables.rows("pdbx_struct_assembly", "details")) or None


def _num_cis_peptides(tables: Tables) -> int | None:
    """Over all models, within a chain and forwards."""
    if "struct_mon_prot_cis" not in tables:
        return 0 if _is_whole(tables) else None
    names = ("pdbx_id", "label_asym_id", "pdbx_label_asym_id_2", "label_seq_id", "pdbx_label_seq_id_2")
    rows = tables.rows("struct_mon_prot_cis", *names)
    numbered = [row for row in rows if row[3].isdecimal() and row[4].isdecimal()]
    return len({row[0] for row in numbered if row[1] == row[2] and int(row[3]) <= int(row[4])})


def _entity_facts(tables: Tables) -> dict[str, int]:
    types = [row[0] for row in tables.rows("entity", "type")]
    if not types or "" in types:
        return {"num_polymer_entities": len(unique(tables.rows("entity_poly", "entity_id"))) or None}
    return {
        "num_entities": len(types),
        "num_polymer_entities": types.count("polymer"),
        "num_nonpolymer_entities": types.count("non-polymer"),
        "num_branched_entities": types.count("branched"),
        "num_solvent_entities": types.count("water"),
    }


def _polymer_facts(tables: Tables) -> dict[str, int | str]:
    """By the type of each polymer; branched sugars count as a kind of their own."""
    types = [row[0] for row in tables.rows("entity_poly", "type")]
    if not types or "" in types:
        return {}
    kinds = count_kinds(types)
    of_all = composition(kinds + count_kinds(row[0] for row in tables.rows("pdbx_entity_branch", "type")))
    return {
        "num_dna_entities": kinds["DNA"],
        "num_rna_entities": kinds["RNA"],
        "num_hybrid_entities": kinds["NA-hybrid"],
        "num_nucleic_acid_entities": kinds["DNA"] + kinds["RNA"],
        "polymer_composition": of_all,
        "polymer_type": polymer_type(of_all),
        "nucleic_acid_type": nucleic_acid_type(of_all),
    }


def _representative(tables: Tables, models: list[str], methods: tuple[str, ...]) -> str:
    """The model whose atoms are counted: of NMR the one the authors chose, else number 1, else the first."""
    chosen = tables.values("pdbx_nmr_representative", "conformer_id")
    chosen += tables.values("pdbx_nmr_ensemble", "representative_conformer")
    chosen = chosen if any("NMR" in method for method in methods) else ()
    return next((model for model in (*chosen, "1") if model in models), models[0])


def _atom_facts(tables: Tables, methods: tuple[str, ...]) -> dict[str, int]:
    """Counts in one model, every altloc counted; hydrogen includes its isotopes."""
    model = tables.models()
    numbers = unique(model[np.flatnonzero(np.r_[True, model[1:] != model[:-1]])].tolist()) if model is not None else ()
    facts = {"num_models": max(1, len(numbers))}
    symbol = tables.texts("atom_site", "type_symbol")
    component = tables.texts("atom_site", "label_comp_id", "auth_comp_id")
    if symbol is None or (symbol == "").any():
        return facts
    hydrogen = np.logical_or.reduce([symbol == name for name in HYDROGENS])
    water = np.logical_or.reduce([component == name for name in WATERS])
    if len(numbers) > 1:
        names = [str(number) for number in numbers]
        here = model == numbers[names.index(_representative(tables, names, methods))]
        hydrogen, water = hydrogen[here], water[here]
    num_hydrogen = int(np.count_nonzero(hydrogen))
    return facts | {
        "num_heavy_atoms": len(hydrogen) - num_hydrogen,
        "num_hydrogen_atoms": num_hydrogen,
        "num_solvent_atoms": int(np.count_nonzero(water & ~hydrogen)),
    }


def _bond_facts(tables: Tables) -> dict[str, int | tuple[str, ...]]:
    """Covalent bonds between residues beyond those of the chain, metal bonds, and what is bound by either.

    Disulfides are of another type. Bound components are those of non-polymer entities.
    """
    if "struct_conn" not in tables and not _is_whole(tables):
        return {}
    names = ("conn_type_id", "ptnr1_label_asym_id", "ptnr1_label_comp_id", "ptnr2_label_asym_id", "ptnr2_label_comp_id")
    rows = [(row[0].lower(), *row[1:]) for row in tables.rows("struct_conn", *names)]
    entity_of, type_of = dict(tables.rows("struct_asym", "id", "entity_id")), dict(tables.rows("entity", "id", "type"))
    bonded = [row for row in rows if row[0] in ("covale", "metalc")]
    partners = {pair for row in bonded for pair in (row[1:3], row[3:5])}
    bound = {component for label, component in partners if type_of.get(entity_of.get(label)) == "non-polymer"}
    return {
        "num_covalent_bonds": sum(row[0] == "covale" for row in rows),
        "num_metal_bonds": sum(row[0] == "metalc" for row in rows),
        "nonpolymer_components": tuple(sorted(bound)) if type_of or not bonded else None,
    }
