"""What a run is made of, by fingerprint: a checkpoint notes it, so that a resume with another is refused by its
name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLED_BYTES = 2**16


def identity_of(data: Iterable[str], tokenizer, llm: Path, encoders: dict[str, str]) -> dict[str, str]:
    """{"data" | "tokenizer" | "llm" | name of an encoder: hex digest}. data: fingerprints of the splits. encoders: by
    name; one without a fingerprint is left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    found = {"data": digest("\n".join(data)), "tokenizer": digest(words), "llm": llm_fingerprint(llm)}
    return {**found, **{name: fingerprint for name, fingerprint in encoders.items() if fingerprint}}


def llm_fingerprint(directory: Path) -> str:
    """Of config.json, and of name, size, head and tail of each file of weights: all of it would take minutes at 8B. It
    tells another model, size or format, not one changed value in the middle."""
    parts = [(directory / "config.json").read_bytes()]
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(SAMPLED_BYTES)
            file.seek(max(0, size - SAMPLED_BYTES))
            parts += [f"{path.name} {size}".encode(), head, file.read(SAMPLED_BYTES)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
