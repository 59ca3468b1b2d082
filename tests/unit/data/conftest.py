import pytest
from entry_files import BAD, GOOD, write_files


@pytest.fixture
def structures(tmp_path):
    """A folder of five files that can be read and six that cannot be samples."""
    return write_files(tmp_path / "structures", GOOD | BAD)
