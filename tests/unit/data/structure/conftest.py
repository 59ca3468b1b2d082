"""What the tests of structure files share."""

import pytest

from proteingpt.data.structure import read_entry


@pytest.fixture
def entry(tmp_path):
    def write_and_read(content, name="9xyz.cif"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_entry(path)

    return write_and_read
