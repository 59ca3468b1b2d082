"""Running the project's commands as a user does: in a folder of their own, with the environment's programs on PATH."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LINKED = ("launch", "ds_configs")


def workplace(directory: Path) -> Path:
    """A folder in which the README's relative paths hold, and in which runs/ and shards/ are its own."""
    for name in LINKED:
        (directory / name).symlink_to(REPOSITORY / name)
    return directory


def environment() -> dict[str, str]:
    """Without what an outer launcher may have left, so that the command sees a user's shell."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_", "PMI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def execute(command: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a shell command line in a process group of its own, which is ended with it."""
    process = subprocess.Popen(
        command, shell=True, cwd=cwd, env=environment(), text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
