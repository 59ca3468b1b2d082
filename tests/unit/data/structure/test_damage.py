"""Whatever is wrong with a file is a StructureError that names it."""

import gzip
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_files import as_bcif, everything, mmcif, numbered, pdb, residue

from proteingpt.data.structure import STRUCTURE_SUFFIXES, StructureError, files, find_structures, read_entry


def refused(entry, content, name, *said):
    with pytest.raises(StructureError) as caught:
        entry(content, name).protein()
    for part in (name, *said):
        assert part in str(caught.value)


@pytest.mark.parametrize(("content", "name", "said"), [
    (b"", "a.cif", "the file is empty"),
    (b" \n\n", "a.pdb", "the file is empty"),
    (bytes(range(256)) * 20, "a.pdb", "binary content"),
    (b"\x00\x01\x02" * 100, "a.bcif", "not a whole BinaryCIF"),
    (b"\x83\xa7encoder\xadsomething\xaadataBlocks\xdd\xff\xff", "a.bcif", "cannot be read"),
    (b"<html>not found</html>", "a.cif", "neither mmCIF"),
    (b"data_x\n_cell.length_a 3\n", "a.cif", "no atom_site category"),
    (b"HEADER    HYDROLASE\nTITLE     NOTHING ELSE\n", "a.pdb", "no ATOM or HETATM record"),
    (gzip.compress(b"data_x\n" * 5000, mtime=0)[:-20], "a.cif.gz", "damaged or truncated gzip"),
    (b"\x1f\x8b\x08 and then rubbish", "a.cif.gz", "gzip"),
])  # fmt: skip
def test_what_is_no_structure_is_refused_with_its_reason(entry, content, name, said):
    refused(entry, content, name, said)


def test_a_path_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(StructureError, match="nowhere.cif: cannot be opened: No such file"):
        read_entry(tmp_path / "nowhere.cif")
    with pytest.raises(StructureError, match="cannot be opened: Is a directory"):
        read_entry(tmp_path)


def test_a_small_file_takes_little_memory_and_one_beyond_the_bound_is_refused(tmp_path, monkeypatch):
    """Gzip does not say how much is in it: what is read is bounded as it comes, and nothing is reserved beforehand."""
    path = tmp_path / "a.cif.gz"
    path.write_bytes(gzip.compress(b"data_x\n" * 100_000))
    tracemalloc.start()
    assert len(files.read_bytes(path)) == 700_000
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 699_999)
    with pytest.raises(StructureError, match="more than 699999 bytes unpacked; .* set it aside"):
        read_entry(path)


def test_an_mmcif_cut_inside_a_row_is_refused(entry):
    text = everything()[0]
    last_rows = text.rstrip().rsplit(" ", 3)[0]
    refused(entry, last_rows, "a.cif", "ends inside a row", "fetch it again")


def test_an_mmcif_cut_between_rows_is_told_by_its_missing_category_end(entry):
    """The archives end each category with `#`; a cut after a whole row leaves the last one open."""
    head = "".join(f"_invented_{i}.id 1\n#\n" for i in range(10))
    text = mmcif(residue("GLY", 1) + residue("ALA", 2), {"1": numbered("GLY", "ALA")}, head)
    text = text.replace("9XYZ\n", "9XYZ\n#\n").replace("\nloop_\n_", "\n#\nloop_\n_").replace("#\n#\n", "#\n") + "#\n"
    assert entry(text).protein().resolved.all()
    cut = text.rstrip("#\n").rsplit("\n", 1)[0] + "\n"
    refused(
        entry, cut, "a.cif", "truncated: every category is closed by a # line except the last", "fetch the file again"
    )


def test_an_mmcif_cut_inside_a_text_field_is_refused(entry):
    refused(
        entry, everything()[0] + "_struct.title\n;goes on and", "a.cif", "ends inside a text field", "fetch it again"
    )


def test_a_pdb_file_that_complies_with_the_format_and_has_no_end_is_refused(entry):
    head = "REMARK   4 9XYZ COMPLIES WITH FORMAT V. 3.30, 13-JUL-11"
    text = pdb(residue("GLY", 1), None, head)
    assert entry(text, "a.pdb").protein().sequence == "G"
    refused(entry, text.replace("END\n", ""), "a.pdb", "END record is missing", "fetch the file again")


@pytest.mark.parametrize(("old", "new", "said"), [
    (" 5.000 0.000 0.000 ", " 5.0oo 0.000 0.000 ", "Cartn_x holds a broken number"),
    (" 5.000 0.000 0.000 ", " inf 0.000 0.000 ", "beyond reason"),
    (" 5.000 0.000 0.000 ", " 5e30 0.000 0.000 ", "beyond reason"),
    (" A 1 5 ? ", " A 1 77777777777777777777777 ? ", "broken number"),
    (" A 1 5 ? ", " A 1 2000000000 ? ", "places residue 2000000000"),
    ("_atom_site.Cartn_y\n", "", "ends inside a row"),
    ("_atom_site.Cartn_y", "_atom_site.Cartn_u", "no column Cartn_y"),
    ("_entity_poly_seq.num", "_entity_poly_seq.hmm", "entity_poly_seq.num"),
    ("1 3 PRO\n", "1 3\n", "entity_poly_seq cannot be parsed"),
])  # fmt: skip
def test_broken_tables_are_refused_by_name(entry, old, new, said):
    text = everything()[0]
    assert old in text
    refused(entry, text.replace(old, new), "a.cif", said)


@pytest.mark.parametrize(("old", "new", "said"), [
    ("   5.000   0.000", "   5.0x0   0.000", "broken number for x"),
    ("   5.000   0.000", "     nan   0.000", "x is nan"),
    ("  0.40 20.00", "  0.4. 20.00", "broken number for occupancy"),
    ("ALA A  62 ", "ALA A  6? ", "residue number '6?'"),
])  # fmt: skip
def test_broken_pdb_numbers_are_refused_by_name(entry, old, new, said):
    text = everything()[1]
    assert old in text
    refused(entry, text.replace(old, new), "a.pdb", said)


def test_a_length_beyond_reason_in_binarycif_is_refused_before_it_is_allocated(entry):
    """The row count of atom_site, a MessagePack integer, overwritten by 2^31 - 1."""
    content = as_bcif(everything()[0])
    num_atoms = sum(line.startswith(("ATOM", "HETATM")) for line in everything()[0].splitlines())
    assert num_atoms < 128
    old = b"\xa8rowCount" + bytes([num_atoms])
    assert old in content
    refused(entry, content.replace(old, b"\xa8rowCount\xce\x7f\xff\xff\xff"), "a.bcif", "rowCount is 2147483647")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_but_structure_error(tmp_path_factory, data):
    """Any of the three formats, cut anywhere or with bytes overwritten: a protein or a StructureError."""
    cif, old = everything()
    content = bytearray(data.draw(st.sampled_from([cif.encode(), as_bcif(cif), old.encode()])))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "x"
    path.write_bytes(bytes(content))
    try:
        read = read_entry(path)
        for chain in read.chains:
            read.protein(chain)
    except StructureError as error:
        assert str(path) in str(error)


def test_structures_are_found_flat_and_in_sub_folders_sorted(tmp_path):
    wanted = ["cb/1cbs.cif.gz", "ab/2ABC.PDB", "pdb1abc.ent.gz", "x.bcif", "y.mmcif", "z.pdbx"]
    for name in [*wanted, "manifest.tsv", "1cbs.cif.bak", "cif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_structures(tmp_path) == sorted(tmp_path / name for name in wanted)
    assert ".bcif.gz" in STRUCTURE_SUFFIXES


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path):
    """A mirror whose two-letter folders lie on other disks, with a link back to its own top."""
    elsewhere, mirror = tmp_path / "elsewhere", tmp_path / "mirror"
    elsewhere.mkdir()
    mirror.mkdir()
    (elsewhere / "1cbs.cif").write_text("")
    (mirror / "cb").symlink_to(elsewhere)
    (mirror / "zz").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(mirror)
    assert find_structures(mirror) == [mirror / "cb" / "1cbs.cif"]


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StructureError, match="nothing: not a directory"):
        find_structures(tmp_path / "nothing")
