"""The rows of one data shard's proteins, as the members of an embedding shard: from encoders, or from published files.

The next forward has begun when one's rows are written. A protein that cannot be read or encoded is left out, with the
reason.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from proteingpt.data.published import embedding_files, read_embedding
from proteingpt.data.shards import EncodedSample, ShardError, ShardSet, replacing, write_shards
from proteingpt.encoders import packed
from proteingpt.encoders.ahead import one_ahead
from proteingpt.encoders.cache import MEMBER, CachedPart
from proteingpt.encoders.cache_plan import Job
from proteingpt.encoders.pair import NoEncoder, Rows
from proteingpt.encoders.rows_file import encode_rows, inputs_sha256
from proteingpt.encoders.weights import ESM_IF1_NAME
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

RECORD_NAME = "record.json"  # of a shard in the making, and until the cache is finished: its part of the manifest


class Published:
    """Rows of ESM-IF1 that were published as `.pt` files, in the place of encoders: structure only, weights unknown."""

    def __init__(self, folder: str | Path, dtype: str):
        self.files, self.dtype = embedding_files(folder), getattr(torch, dtype)
        self.structure, self.sequence = CachedPart(ESM_IF1_NAME, 512, ""), NoEncoder("cpu")

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        """ValueError where there is no file of a protein, or one of another length."""
        rows = [self._read(protein) for protein in proteins]
        return rows, [torch.zeros(0, 0) for _ in proteins]

    def _read(self, protein: Protein) -> torch.Tensor:
        if protein.id not in self.files:
            raise ValueError(f"no published embedding {protein.id}.pt")
        rows = read_embedding(self.files[protein.id])
        if len(rows) != len(protein) + ENCODER_EXTRA_ROWS:
            wanted = f"the sample of {len(protein)} residues wants {len(protein) + ENCODER_EXTRA_ROWS}"
            raise ValueError(
                f"{self.files[protein.id].name} has {len(rows)} rows, {wanted}: unresolved residues were dropped"
            )
        return torch.from_numpy(rows).to(self.dtype)


def rows_on_host(rows: Rows) -> tuple[Rows, "torch.cuda.Event | None"]:
    """The rows on their way to the CPU, and when they are there; None where they are."""
    on_gpu = any(part and part[0].is_cuda for part in rows)
    moved = tuple([r.to("cpu", non_blocking=on_gpu) for r in part] for part in rows)
    event = torch.cuda.Event() if on_gpu else None
    if event:
        event.record()
    return moved, event


def entries(
    shards: ShardSet, job: Job, encoders, dtype: str, together: bool, left_out: dict, tell
) -> Iterator[EncodedSample]:
    """The job's proteins as members, in order; one that cannot be read or encoded goes to left_out with the reason.

    tell(number of residues): after each forward. The next forward has begun when one's rows are written.
    """
    lengths = (shards.num_residues[job.first : job.last] + ENCODER_EXTRA_ROWS).tolist()
    forwards = packed.packs(lengths, packed.MAX_ROWS) if together else ([i] for i in range(len(lengths)))

    def encode(numbers: list[int]):
        proteins = [p for p in (read(job.first + i) for i in numbers) if p]
        try:
            return proteins, rows_on_host((encoders.encode_together if together else encoders.encode)(proteins))
        except ValueError as error:
            if len(proteins) == 1:
                left_out[proteins[0].key] = str(error)
                return [], (([], []), None)
            return again_alone(proteins)

    def again_alone(proteins: list[Protein]):
        found = [encode_one(protein) for protein in proteins]
        good = [(protein, rows) for protein, rows in zip(proteins, found) if rows]
        rows = tuple([rows[part][0] for _, rows in good] for part in (0, 1))
        return [protein for protein, _ in good], rows_on_host(rows)

    def encode_one(protein: Protein) -> Rows | None:
        try:
            return encoders.encode([protein])
        except ValueError as error:
            left_out[protein.key] = str(error)
            return None

    def read(number: int) -> Protein | None:
        try:
            return shards.read_protein(number)
        except ShardError as error:
            left_out[shards.keys[number]] = str(error)
            return None

    for numbers, (proteins, (rows, there)) in one_ahead(forwards, encode):
        if there:
            there.synchronize()
        for protein, *both in zip(proteins, *rows, strict=True):
            if not all(part.isfinite().all() for part in both):
                left_out[protein.key] = f"rows that are not finite in {dtype}: cache them in another --dtype"
                continue
            data = encode_rows(protein.key, inputs_sha256(protein), *both, dtype)
            yield EncodedSample(protein.key, len(protein), 0, {MEMBER: data})
        tell(sum(lengths[i] - ENCODER_EXTRA_ROWS for i in numbers))


def write_shard(
    scratch: Path, job: Job, shards: ShardSet, encoders, dtype: str, together: bool, tell: Callable[[int], None]
) -> None:
    """The job's embedding shard with its index and record, in the empty directory `scratch`."""
    left_out: dict[str, str] = {}
    samples = entries(shards, job, encoders, dtype, together, left_out, tell)
    written = write_shards(scratch, {job.split: samples}, samples_per_shard=None, options={})["splits"][job.split]
    shard = None
    if written:
        (shard,) = written
        for name, ending in (("file", ".tar"), ("index_file", ".index.jsonl")):
            (scratch / shard[name]).rename(scratch / f"{job.name}{ending}")
            shard[name] = f"{job.name}{ending}"
    with replacing(scratch / RECORD_NAME) as file:
        file.write(json.dumps({"shard": shard, "left_out": left_out}).encode())
