"""Finds the published checkpoint files and reads them without running anything that is in them.

Files are read in fair-esm's own `.pt` formats, so that what a user has already downloaded is what is used; nothing is
downloaded here. A pickle may call any function while it is read, so only tensors and plain containers are rebuilt and
every other class becomes an inert stub: a file whose weights need a class of its own cannot be read.
"""

import hashlib
import pickle
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

ESM2_NAMES = (
    "esm2_t6_8M_UR50D",
    "esm2_t12_35M_UR50D",
    "esm2_t30_150M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)
ESM_IF1_NAME = "esm_if1_gvp4_t16_142M_UR50"
PUBLISHED_NAMES = (*ESM2_NAMES, ESM_IF1_NAME)
# The address that fair-esm's `pretrained.py` downloads from.
MODEL_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"

ESM2 = "ESM-2"
ESM_IF1 = "ESM-IF1"

# Our torch-only forwards, and fair-esm's own code.
BACKENDS = ("fast", "reference")


class WeightsNotFound(FileNotFoundError, ValueError):
    """The checkpoint file that was asked for is not on this machine."""


class UnknownWeights(ValueError):
    """Neither a published name nor a path."""


class BadCheckpoint(ValueError):
    """A file was found, but it is not the checkpoint that was asked for, or it is damaged."""


@dataclass(frozen=True)
class WeightsFile:
    """A checkpoint file as it was when it was loaded: size in bytes and modification time in nanoseconds."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> "WeightsFile":
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def sha256(self) -> str:
        """Hex digest of the file's bytes; read once per file and process. ValueError where the file has changed."""
        return _sha256(self)


@lru_cache(maxsize=64)
def _sha256(file: WeightsFile) -> str:
    with open(file.path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if WeightsFile.at(file.path) != file:
        raise ValueError(f"{file.path} has changed since it was loaded: load it again to know what the weights are")
    return digest


def fingerprint(files: tuple[WeightsFile, ...]) -> str:
    """sha256 of the file, in hex; of several, that of their digests."""
    digests = [file.sha256() for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class FrozenEncoder:
    """What both encoders are beside their forward. width: columns of a row; device, dtype: of the rows."""

    def __init__(self, model, width: int, files: tuple[WeightsFile, ...], device: torch.device, dtype: torch.dtype):
        self.model, self.width, self.device, self.dtype = model, width, device, dtype
        self._files = files

    @property
    def fingerprint(self) -> str:
        """sha256 of the files that decide the weights, in hex; computed when first asked for."""
        return fingerprint(self._files)


def find_weights(name_or_path: str | Path, weights_dir: str | Path = "weights") -> Path:
    """The checkpoint file for a published name or a path.

    A path is taken as it is: a file, or a Hugging Face directory. A name is looked for in `weights_dir`, then where
    fair-esm downloads to.
    Raises WeightsNotFound, or UnknownWeights for a word that is neither.
    """
    text = str(name_or_path)
    if text in PUBLISHED_NAMES:
        return _find_published(text, Path(weights_dir))
    path = Path(text).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise WeightsNotFound(
            f"{path} is a directory without a config.json: wanted a fair-esm checkpoint file (.pt) or, for ESM-2, a "
            "Hugging Face directory in its place"
        )
    if len(path.parts) > 1 or path.suffix == ".pt":
        hint = f"; get it from {MODEL_URL.format(name=path.stem)}" if path.stem in PUBLISHED_NAMES else ""
        raise WeightsNotFound(f"no encoder weights at {path.absolute()}{hint}")
    raise UnknownWeights(
        f"unknown encoder weights {text!r}: wanted the path of a .pt file, or one of {', '.join(PUBLISHED_NAMES)}"
    )


def _find_published(name: str, weights_dir: Path) -> Path:
    folders = (weights_dir, Path(torch.hub.get_dir()) / "checkpoints")
    candidates = [(folder.expanduser() / f"{name}.pt").absolute() for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = "".join(f"\n  {candidate}" for candidate in candidates)
    raise WeightsNotFound(
        f"encoder weights {name}.pt not found. Looked for:{looked}\n"
        f"Download {MODEL_URL.format(name=name)} to one of these places, or give the path of the file."
    )


def load_checkpoint(path: str | Path) -> dict:
    """The dict in a checkpoint file, on the CPU, without running anything that is pickled in it.

    Tensors may lie on a memory map of the file: copy what is to be kept. Raises BadCheckpoint.
    """
    path = Path(path)
    with open(path, "rb") as stream:
        start = stream.read(512)
    if not start:
        raise BadCheckpoint(f"{path} is empty: download it again")
    if start.lstrip().startswith(b"<"):
        raise BadCheckpoint(f"{path} is a web page (HTML or XML), not a checkpoint: the download failed; get it again")
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict):
        raise BadCheckpoint(f"{path} holds a {type(checkpoint).__name__}, wanted a fair-esm checkpoint (a dict)")
    return checkpoint


def _read(path: Path):
    # Older files are not zip archives and cannot be mapped; a zip cut short has lost the directory at its end.
    options = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}
    try:
        try:
            with torch.serialization.safe_globals([Namespace]):
                return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError:
            # Some class outside torch's list, such as the optimizer state that ESM-IF1's file carries.
            return torch.load(path, weights_only=False, pickle_module=_restricted_pickle(), **options)
    except Exception as error:  # bytes that are no pickle can fail in any way
        reason = str(error).strip().split("\n")[0]
        raise BadCheckpoint(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint: it is cut short, damaged or of "
            f"another kind ({type(error).__name__}: {reason}). Download it again."
        ) from error


class InertStub:
    """Stands for an object of a class that is not rebuilt. Takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass

    def add(self, item):
        pass


@cache
def _stub_class(module: str, name: str) -> type:
    return type(name, (InertStub,), {"__module__": f"not_loaded.{module}"})


# All that is needed to rebuild tensors and the containers around them. Python 2 wrote builtins as __builtin__.
_REBUILT = {
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): Namespace,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return _stub_class(module, name)


def _restricted_pickle() -> types.ModuleType:
    """What `torch.load` calls its pickle module, with the unpickler that stubs out unknown classes."""
    module = types.ModuleType("restricted_pickle")
    module.Unpickler = _RestrictedUnpickler
    module.load = lambda stream, **options: _RestrictedUnpickler(stream, **options).load()
    return module


def kind_of(checkpoint: Mapping) -> str:
    """ESM2, ESM_IF1, or a phrase that says what else the dict looks like."""
    cfg, args = checkpoint.get("cfg"), checkpoint.get("args")
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), Namespace):
        return ESM2
    arch = getattr(args, "arch", None) if isinstance(args, Namespace) else None
    if isinstance(arch, str):
        return ESM_IF1 if "invariant_gvp" in arch else f"fair-esm's architecture {arch!r}"
    return f"a dict with the keys {sorted(map(str, checkpoint))[:8]}"


def check_kind(checkpoint: Mapping, wanted: str, path: Path) -> None:
    """Raises BadCheckpoint unless `checkpoint` is of the kind `wanted` and holds a dict of weights."""
    found = kind_of(checkpoint)
    if found != wanted:
        raise BadCheckpoint(f"{path} is {found}: wanted an {wanted} checkpoint in fair-esm's format")
    if not isinstance(checkpoint.get("model"), dict):
        raise BadCheckpoint(f"{path} has no weights: its 'model' is {type(checkpoint.get('model')).__name__}")


def read_settings(namespace: Namespace, kinds: Mapping[str, type], path: Path) -> Namespace:
    """The fields named in `kinds`, each checked to be there and of its type. Raises BadCheckpoint."""
    wrong = [
        f"{name} = {getattr(namespace, name, 'missing')!r} (wanted {kind.__name__})"
        for name, kind in kinds.items()
        if not isinstance(getattr(namespace, name, None), (int, float) if kind is float else kind)
    ]
    if wrong:
        raise BadCheckpoint(f"the configuration in {path} does not describe the encoder: {'; '.join(wrong)}")
    return Namespace(**{name: getattr(namespace, name) for name in kinds})


def check_backend(name: str) -> None:
    """Raises ValueError unless `name` is a backend of the encoders."""
    if name not in BACKENDS:
        raise ValueError(f"encoder backend {name!r} is not known: wanted one of {', '.join(BACKENDS)}")


def affine_shapes(name: str, num_in: int, num_out: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a linear map's tensors."""
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer norm's tensors."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def check_weights(found: Mapping, wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises BadCheckpoint unless `found` has exactly the names of `wanted`, each a tensor of that shape."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of the model that the file's own configuration describes"
                 for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        value = found[name]
        if not isinstance(value, torch.Tensor):
            problems.append(f"{name} is a {type(value).__name__}, wanted a tensor")
        elif value.shape != wanted[name]:
            problems.append(f"{name} has shape {tuple(value.shape)}, wanted {tuple(wanted[name])}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise BadCheckpoint(f"the weights in {path} do not fit: {len(problems)} tensors are wrong: {shown}")
