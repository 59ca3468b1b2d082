"""Encoder rows from embedding shards, in the place of encoders: what training reads with --embeddings.

A directory that launch/cache_embeddings.py wrote: WebDataset tars, one for each data shard, an index beside each, and a
manifest that says of which data and which weights the rows are. Everything is compared before anything is trained, and
each entry again when it is read. Given up: caches that are not on a file system.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from proteingpt.config import NO_ENCODER, EncodersConfig
from proteingpt.data.shards import MANIFEST_NAME, ShardError, ShardSet
from proteingpt.encoders import weights
from proteingpt.encoders.esm2 import files_of
from proteingpt.encoders.pair import Encoders, NoEncoder, Remembering, Rows
from proteingpt.encoders.rows_file import PARTS, decode_rows, inputs_sha256
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

FORMAT, FORMAT_VERSION = "proteingpt-embeddings", 1
MEMBER = "safetensors"  # KEY.safetensors; short, because a tar's names are
# The recipe's name of each part's encoder.
SETTINGS = dict(zip(PARTS, ("esm_if1", "esm2"), strict=True))
HEADER_BYTES = 1024  # surely holds an entry's header
MAX_OPEN_SHARDS = 256
MAX_NAMED = 5
REMEMBERED_BYTES = 2**28  # of rows computed anew

log = logging.getLogger("proteingpt")


class CacheError(ShardError):
    """A directory of embeddings that cannot be used, or not for this data and these encoders."""


class BrokenRows(ShardError):
    """One entry of the cache is damaged, absent, or of another protein."""


# ------------------------------------------------------------------------------------------------- whose rows they are


def weights_name(name_or_path: str) -> str:
    """What weights are called wherever they lie: the published name, or that of the file or directory."""
    return Path(name_or_path).name.removesuffix(".pt")


def identity(encoder, name_or_path: str) -> dict | None:
    """What a manifest says of an encoder; None of one that is left out."""
    if not encoder.width:
        return None
    layers = {name: getattr(encoder, name, None) for name in ("layer", "num_layers")}
    return {"name": weights_name(name_or_path), "sha256": encoder.fingerprint, "width": encoder.width, **layers}


def hashes_at_hand(config: EncodersConfig) -> dict[str, str | None]:
    """{part: sha256 of the weights that the recipe names}, None where they are not on this machine. Loads nothing."""
    found: dict[str, str | None] = {}
    for part, setting in SETTINGS.items():
        value, found[part] = getattr(config, setting), None
        if value not in (None, NO_ENCODER):
            with contextlib.suppress(weights.WeightsNotFound, weights.UnknownWeights):
                files = files_of(weights.find_weights(value, config.weights_dir))
                found[part] = weights.fingerprint(tuple(map(weights.WeightsFile.at, files)))
    return found


def encoder_differences(
    manifest: Mapping, config: EncodersConfig, hashes: Mapping[str, str | None]
) -> list[str]:
    """A line for each thing in which the recipe's encoders are not the cache's. A recipe that names no encoder takes
    the cache's; one that says `none` leaves the cache's aside. hashes: of weights at hand; without them names are
    compared."""
    lines = [
        f"encoders.{name} is {getattr(config, name)!r}, the cache's rows are {manifest[name]!r}"
        for name in ("dtype", "backend")
        if getattr(config, name) != manifest[name]
    ]
    for part, setting in SETTINGS.items():
        wanted, cached, at = getattr(config, setting), manifest["encoders"][part], f"encoders.{setting}"
        if cached is None:
            if wanted not in (None, NO_ENCODER):
                lines.append(f"{at} is {wanted!r}, the cache has no {part} rows: cache them, or give --{at} none")
        elif wanted not in (None, NO_ENCODER):
            found = hashes[part]
            if found and cached["sha256"] and found != cached["sha256"]:
                lines.append(
                    f"{at}: the weights {wanted} have sha256 {found[:12]}, the cache's {cached['sha256'][:12]}"
                )
            elif not (found and cached["sha256"]) and weights_name(wanted) != cached["name"]:
                lines.append(f"{at} is {wanted!r}, the cache's rows are of {cached['name']}")
            layer = cached["num_layers"] if config.esm2_layer is None else config.esm2_layer
            if part == "sequence" and layer != cached["layer"]:
                lines.append(
                    f"encoders.esm2_layer is {config.esm2_layer}, the cache's rows are of layer {cached['layer']}"
                )
    return lines


# ------------------------------------------------------------------------------------------------------------ reading


class Place(NamedTuple):
    """Where an entry lies: number of its file, first byte, bytes, CRC-32."""

    file: int
    offset: int
    size: int
    crc: int


class CachedRows:
    """The entries of a cache by key, of all splits. Safe to read from several threads. Raises CacheError."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        records = [record for split in self.manifest["splits"].values() for record in split]
        self.files = [self.directory / record["file"] for record in records]
        self.places: dict[str, Place] = {}
        for number, record in enumerate(records):
            self.places |= read_places(self.directory, record, number)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def left_out(self) -> Mapping[str, str]:
        """{key: why it has no rows}."""
        return self.manifest["left_out"]

    def inputs(self, key: str) -> str:
        """sha256 of what the entry was made from, without reading its rows. Raises BrokenRows."""
        place = self._place(key)
        start = self._read(place, min(HEADER_BYTES, place.size))
        try:
            return json.loads(bytes(start[8 : 8 + int.from_bytes(start[:8], "little")]))["__metadata__"]["inputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(key, f"its header is damaged ({type(error).__name__})") from error

    def read(self, protein: Protein) -> dict[str, torch.Tensor]:
        """{part: (L + 2, W)} in the cache's dtype, on the CPU. Raises BrokenRows that names file, key and reason."""
        key = protein.key
        place = self._place(key)
        data = self._read(place, place.size)
        if zlib.crc32(data) != place.crc:
            raise self._broken(key, "wrong checksum")
        try:
            metadata, rows = decode_rows(data)
        except ValueError as error:
            raise self._broken(key, str(error)) from error
        if metadata.get("inputs") != inputs_sha256(protein):
            raise self._broken(key, "it was made from another sequence or structure")
        lengths = {part: len(value) for part, value in rows.items()}
        if set(lengths.values()) != {len(protein) + ENCODER_EXTRA_ROWS}:
            raise self._broken(key, f"it has {lengths} rows, wanted {len(protein) + ENCODER_EXTRA_ROWS}")
        return rows

    def _place(self, key: str) -> Place:
        if key not in self.places:
            why = self.left_out.get(key, "no entry of that key")
            raise BrokenRows(f"embeddings {self.directory}, sample {key}: {why}")
        return self.places[key]

    def _broken(self, key: str, what: str) -> BrokenRows:
        return BrokenRows(f"embeddings {self.files[self._place(key).file]}, sample {key}: {what}")

    def _read(self, place: Place, size: int) -> bytearray:
        data = bytearray(size)
        try:
            with self._open(place.file) as descriptor:
                os.preadv(descriptor, [data], place.offset)  # what is missing at a file's end fails the checksum
        except OSError as error:
            raise BrokenRows(f"embeddings {self.files[place.file]}: cannot be read: {error}") from error
        return data

    @contextlib.contextmanager
    def _open(self, number: int) -> Iterator[int]:
        with self._lock:
            descriptor = self._descriptors.get(number)
            if descriptor is None and len(self._descriptors) < MAX_OPEN_SHARDS:
                descriptor = self._descriptors[number] = os.open(self.files[number], os.O_RDONLY)
        if descriptor is not None:
            yield descriptor
            return
        descriptor = os.open(self.files[number], os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def read_manifest(directory: Path) -> dict:
    """Raises CacheError where there is none, or none that we can read."""
    make = f"make them with python launch/cache_embeddings.py --data DATA --out {directory}"
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CacheError(f"no embeddings in {directory}: it has no {MANIFEST_NAME}, which is written last: {make}")
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path}: not a manifest of embeddings ({type(error).__name__}: {error}): {make}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise CacheError(f"{path} is {found[0]} {found[1]}, wanted {FORMAT} {FORMAT_VERSION}: {make}")
    return manifest


def read_places(directory: Path, record: Mapping, number: int) -> dict[str, Place]:
    """{key: its place} of one embedding shard, whose size and index are compared with the manifest."""
    for name, size in ((record["file"], record["num_bytes"]), (record["index_file"], None)):
        if not (directory / name).is_file():
            raise CacheError(f"{directory / name} is missing, the manifest lists it: copy it again, or cache anew")
        found = (directory / name).stat().st_size
        if size not in (None, found):
            raise CacheError(f"{directory / name} has {found} bytes, the manifest says {size}: copy it again")
    content = (directory / record["index_file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != record["index_sha256"]:
        raise CacheError(f"{directory / record['index_file']}: its sha256 is not the manifest's: copy it again")
    entries = map(json.loads, content.splitlines())
    return {entry["key"]: Place(number, *entry["members"][MEMBER]) for entry in entries}


def data_differences(cache: CachedRows, shard_sets: Sequence[ShardSet]) -> list[str]:
    """A line for each way in which the cache is not of these samples. Shards of other bytes are no difference as long
    as every protein is the same: questions may have been added."""
    known = cache.manifest["data"]
    changed = [shards for shards in shard_sets if known.get(shards.split) != shards.fingerprint]
    keys = [(shards, number, key) for shards in changed for number, key in enumerate(shards.keys)]
    absent = [key for _, _, key in keys if key not in cache.places and key not in cache.left_out]
    other = [] if absent else [key for shards, number, key in keys if not same_inputs(cache, shards, number, key)]
    return [
        f"{len(named)} of {len(keys)} samples {what} "
        f"({', '.join(named[:MAX_NAMED])}{', ...' * (len(named) > MAX_NAMED)})"
        for named, what in ((absent, "are not in it"), (other, "have another sequence or structure there"))
        if named
    ]


def same_inputs(cache: CachedRows, shards: ShardSet, number: int, key: str) -> bool:
    """Also where one of the two cannot be read: that is named when it is met."""
    try:
        return cache.inputs(key) == inputs_sha256(shards.read(number).protein)
    except ShardError:
        return True


def check(directory: str, config: EncodersConfig, shard_sets: Sequence[ShardSet]) -> None:
    """Raises CacheError that says in what the cache differs from the data or the recipe."""
    cache = CachedRows(directory)
    lines = encoder_differences(cache.manifest, config, hashes_at_hand(config)) + data_differences(cache, shard_sets)
    cache.close()
    if lines:
        raise CacheError(f"the embeddings in {directory} do not fit: {'; '.join(lines)}")


# ------------------------------------------------------------------------------------------- in the place of encoders


@dataclass(frozen=True)
class CachedPart:
    """What is asked of an encoder beside its rows. fingerprint: "" where the weights were not known."""

    name: str
    width: int
    fingerprint: str


class CachedEncoders:
    """Answers `encode` like Encoders, from a cache; loads no encoder unless an entry is broken."""

    def __init__(self, directory: str, config: EncodersConfig, device, load: Callable[[], Encoders] | None = None):
        """load: the recipe's encoders, for entries that are broken; by default from the recipe."""
        self.cache, self.device, self.config = CachedRows(directory), torch.device(device), config
        self.structure, self.sequence = (self._part(part) for part in PARTS)
        self._load = load or (lambda: Encoders.load(config, device))
        self._live: Remembering | None = None
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def _part(self, part: str) -> CachedPart | NoEncoder:
        cached = self.cache.manifest["encoders"][part]
        if cached is None or getattr(self.config, SETTINGS[part]) == NO_ENCODER:
            return NoEncoder("cpu")
        return CachedPart(cached["name"], cached["width"], cached["sha256"] or "")

    def read(self, protein: Protein) -> tuple[torch.Tensor, torch.Tensor]:
        """(structure rows, sequence rows) on the CPU. Raises BrokenRows where neither cache nor encoders can serve."""
        try:
            rows = self.cache.read(protein)
        except BrokenRows as error:
            return self._computed(protein, error)
        both = (rows[part] if getattr(self, part).width else torch.zeros(0, 0) for part in PARTS)
        return tuple(both)

    def _computed(self, protein: Protein, error: BrokenRows) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            try:
                self._live = self._live or Remembering(self._the_same_encoders(), REMEMBERED_BYTES)
            except (ValueError, OSError) as absent:
                raise BrokenRows(f"{error}; and it cannot be computed anew: {str(absent).splitlines()[0]}") from error
            if protein.key not in self._named:
                log.warning("%s: computed anew", error)
                self._named.add(protein.key)
            (structure,), (sequence,) = self._live.encode([protein])
        return structure.cpu(), sequence.cpu()

    def _the_same_encoders(self) -> Encoders:
        """ValueError where they are not those of the cache, or not at hand."""
        wanted = [part for part in (self.structure, self.sequence) if part.width]
        unknown = [part.name for part in wanted if not part.fingerprint]
        if unknown:
            raise CacheError(f"the rows of {', '.join(unknown)} were published without their weights' checksum")
        live = self._load()
        found = [part.fingerprint for part in (live.structure, live.sequence) if part.width]
        if found != [part.fingerprint for part in wanted]:
            raise CacheError("the encoders at hand have other weights than the cache's")
        return live

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        """As Encoders.encode."""
        pairs = [self.read(protein) for protein in proteins]
        return tuple([rows.to(self.device) for rows in part] for part in zip(*pairs)) if pairs else ([], [])


def with_names(config: EncodersConfig, directory: str) -> EncodersConfig:
    """The recipe's encoders with what it leaves open taken from the cache."""
    cached = read_manifest(Path(directory))["encoders"]
    names = {SETTINGS[part]: cached[part]["name"] if cached[part] else NO_ENCODER for part in PARTS}
    return dataclasses.replace(config, **{k: v for k, v in names.items() if getattr(config, k) is None})
