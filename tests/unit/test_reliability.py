"""docs/reliability.md names a test for each of its promises: they are there."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists():
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    files = {
        path.relative_to(REPOSITORY / "tests").as_posix(): path for path in (REPOSITORY / "tests").rglob("test_*.py")
    }
    tests = {name for path in files.values() for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named, in_files = re.findall(r"::(test_\w+)", page), re.findall(r"((?:\w+/)*test_\w+\.py)", page)
    assert len(named) > 20 and not set(named) - tests
    assert not [name for name in in_files if not any(path.endswith(name) for path in files)]
