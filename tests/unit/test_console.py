"""A real pipe whose reader goes away: nothing is said, and the status is that of other tools."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAIN = """
import sys
from proteingpt.console import run_command

def main():
    try:
        for line in range({num_lines}):
            print("line", line, flush={flush})
            {wait}
    except OSError as error:  # as every command reports what it cannot read
        sys.exit(f"main: {{error}}")
    return 3

sys.exit(run_command(main))
"""


def start(num_lines: int, flush: bool = False, wait: str = "") -> subprocess.Popen:
    code = MAIN.format(num_lines=num_lines, flush=flush, wait=wait)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True, **pipes)


@pytest.mark.parametrize("num_lines, flush", [(100_000, False), (2, True), (2, False)])
def test_a_reader_that_goes_away_is_no_fault(num_lines, flush):
    """In the middle of much output, at a line that is written at once, and before what is only written at the end."""
    running = start(num_lines, flush, wait="line == 0 and sys.stdin.readline()")
    if flush:
        assert running.stdout.readline() == "line 0\n"
    running.stdout.close()
    running.stdin.write("go on\n")
    running.stdin.close()
    assert (running.wait(60), running.stderr.read()) == (141, "")
    running.stderr.close()


def test_all_of_it_is_written_and_the_status_is_the_commands_own():
    running = start(3)
    assert running.communicate(timeout=60) == ("line 0\nline 1\nline 2\n", "") and running.returncode == 3
