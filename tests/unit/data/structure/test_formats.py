"""The three formats of one entry give one protein, however they are spelled."""

import gzip

import numpy as np
import pytest
from structure_files import as_bcif, everything, rows


def test_mmcif_binarycif_and_pdb_of_one_entry_give_equal_proteins(entry):
    cif, old = everything()
    contents = {"a.cif": cif, "a.bcif": as_bcif(cif), "9xyz.pdb": old}
    contents |= {f"{name}.gz": gzip.compress(c if isinstance(c, bytes) else c.encode()) for name, c in contents.items()}
    for name, content in contents.items():
        read = entry(content, name)
        assert (read.id, read.chains) == ("9xyz", ("A", "B")), name
        assert read.protein("A").sequence == "MYPGA", name
        np.testing.assert_array_equal(read.protein("A").backbone, rows(1, 2, 3, 0, 5), err_msg=name)
        np.testing.assert_array_equal(read.protein("B").backbone, rows(1, 2), err_msg=name)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: "\ufeff# a comment\n\n" + text,
    lambda text: text.replace(" MSE ", " 'MSE' ").replace(" CA ", ' "CA" '),
    lambda text: text.replace("\n_", "\n  _").replace("\nATOM", "\n  ATOM"),
    lambda text: text.replace("data_9XYZ", "data_9XYZ\n_struct.title\n;first line\n_atom_site.id of a trap\nloop_\n;"),
    lambda text: text + "data_comp_XYZ\n_chem_comp.id XYZ\n",
    lambda text: text.replace("ATOM 4 ", "ATOM\n4 "),
])  # fmt: skip
def test_spelling_does_not_change_the_protein(entry, change):
    """Line ends, byte-order mark, quotes, indentation, text fields that look like categories, a second block."""
    protein = entry(change(everything()[0])).protein()
    assert protein.sequence == "MYPGA"
    np.testing.assert_array_equal(protein.backbone, rows(1, 2, 3, 0, 5))


def test_the_format_is_told_by_content_not_by_name(entry):
    assert entry(everything()[0], "wrong.pdb").protein().sequence == "MYPGA"
    assert entry(everything()[1], "wrong.cif").protein().sequence == "MYPGA"
