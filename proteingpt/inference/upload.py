"""Reading what a stranger sends: in a process of its own, with bounds on size, memory and time; nothing reaches the
disk.

`read_upload` starts that process (this module as a command), hands it the bytes, and gets JSON back. It costs about a
second for each upload, and a file that makes a parser run wild ends with a message and not with the server.
"""

import gzip
import io
import json
import os
import resource
import subprocess
import sys
import zlib
from dataclasses import asdict, dataclass

from proteingpt.data.structure import StructureError
from proteingpt.inference import picture, subject

GZIP = b"\x1f\x8b"
BLOCK_BYTES = 1 << 20
REFUSED = 3  # the command's exit status where it says why


@dataclass(frozen=True)
class Limits:
    """packed_bytes: of an upload as it comes; bytes: once unpacked; memory_bytes: of the process that parses it."""

    packed_bytes: int = 50 << 20
    bytes: int = 200 << 20
    memory_bytes: int = 4 << 30
    seconds: int = 60
    residues: int = 5000


def read_upload(data: bytes, name: str, chain: str | None, limits: Limits) -> dict:
    """`describe` of the bytes of a structure file called `name`. Raises StructureError, which begins with the name."""
    order = {"name": name, "chain": chain, "limits": asdict(limits)}
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "proteingpt.inference.upload"], env=environment, capture_output=True,
            input=json.dumps(order).encode() + b"\n" + data, timeout=limits.seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StructureError(f"{name}: took more than {limits.seconds} seconds to read; send the chain alone") from None
    if done.returncode == REFUSED:
        raise StructureError(done.stdout.decode())
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        why = f"reading it failed within the memory and time allowed ({last[0]})"
        raise StructureError(f"{name}: {why}; send the chain alone")
    return json.loads(done.stdout)


def describe(data: bytes, name: str, chain: str | None, limits: Limits) -> dict:
    """The protein, the file's chains, and its picture, which a sequence in FASTA has not. Raises StructureError or
    SubjectError."""
    data = unpack(data, name, limits.bytes)
    if not data.strip():
        raise StructureError(f"{name}: the file is empty")
    if data.lstrip().startswith(b">"):  # FASTA, which no structure file begins like
        try:
            protein = subject.protein_of_sequence(data.decode("ascii", "replace"))
        except subject.SubjectError as error:
            raise StructureError(f"{name}: {error}") from error
        subject.check_length(len(protein), limits.residues)
        return {"protein": subject.to_json(protein), "chains": [], "pdb": None}
    entry, protein = subject.read_structure(name, chain, data)
    subject.check_length(len(protein), limits.residues)
    drawn = picture.pdb_text(entry, chain or protein.chain)
    return {"protein": subject.to_json(protein), "chains": list(entry.chains), "pdb": drawn}


def unpack(data: bytes, name: str, max_bytes: int) -> bytes:
    """Of a gzip file what is in it, else the data. Raises StructureError beyond `max_bytes`, before they are made."""
    if not data.startswith(GZIP):
        return data
    blocks, num_bytes = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while block := file.read(BLOCK_BYTES):
                num_bytes += len(block)
                if num_bytes > max_bytes:
                    raise StructureError(f"{name}: more than {max_bytes >> 20} MB unpacked; send the chain alone")
                blocks.append(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StructureError(f"{name}: damaged or truncated gzip: {error}") from error
    return b"".join(blocks)


def bound_this_process(limits: Limits):
    bounds = {
        resource.RLIMIT_AS: limits.memory_bytes, resource.RLIMIT_CPU: limits.seconds, resource.RLIMIT_FSIZE: 0
    }  # fmt: skip
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def main() -> int:
    order = json.loads(sys.stdin.buffer.readline())
    limits = Limits(**order.pop("limits"))
    bound_this_process(limits)
    try:
        found = describe(sys.stdin.buffer.read(), **order, limits=limits)
    except subject.USER_ERRORS as error:
        sys.stdout.write(str(error))
        return REFUSED
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
