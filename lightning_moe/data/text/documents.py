"""Documents: where they come from, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Generic, NamedTuple, TypeVar

from lightning_moe.errors import ConfigError

T = TypeVar("T")

# Tests and IDLE are two thirds of the sources and repeat themselves; the rest is not the library or not there for
# every installation.
_LEFT_OUT: Final = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One text."""

    name: str
    """Path below the folder of the corpus, with forward slashes."""
    text: bytes
    """The text in UTF-8."""


class Split(NamedTuple, Generic[T]):
    """The parts of a corpus."""

    training: T
    validation: T
    test: T


def read_standard_library() -> list[Document]:
    """Read the Python sources of the standard library, without its tests and IDLE; about 11 MB.

    Raises:
        ConfigError: This Python has no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in folder.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(folder).parts)]
    if not paths:
        raise ConfigError("data.path", None, "a path", f"there are no sources of the standard library in {folder}")
    return _read(folder, paths)


def read_folder(folder: Path, pattern: str) -> list[Document]:
    """Read all files of a folder and the folders below it whose names match a pattern.

    Args:
        folder: The folder.
        pattern: A pattern such as ``*.txt``.

    Raises:
        ConfigError: No file matches.
    """
    paths = [path for path in folder.rglob(pattern) if path.is_file()]
    if not paths:
        raise ConfigError("data.pattern", pattern, f"a pattern of files in {folder}", "no file there matches it")
    return _read(folder, paths)


def split_documents(documents: Sequence[Document], modulus: int) -> Split[list[Document]]:
    """Hold documents out by the MD5 of their names: remainder 0 for the test, 1 for validation.

    A document thus stays in its part when others are added or removed.

    Args:
        documents: The documents.
        modulus: Number of parts.

    Raises:
        ConfigError: A part is empty.
    """
    # The name as bytes, as file systems have it: it need not be UTF-8.
    remainders = [int(hashlib.md5(os.fsencode(one.name), usedforsecurity=False).hexdigest(), 16) for one in documents]
    parts: Split[list[Document]] = Split([], [], [])
    for document, remainder in zip(documents, remainders, strict=True):
        part = {0: parts.test, 1: parts.validation}.get(remainder % modulus, parts.training)
        part.append(document)
    for name, part in parts._asdict().items():
        if not any(document.text for document in part):
            raise ConfigError(
                "data.holdout_modulus",
                modulus,
                "a number of parts with documents in each",
                f"of the {len(documents)} documents none with any text falls to {name}",
            )
    return parts


def _read(folder: Path, paths: Iterable[Path]) -> list[Document]:
    # Sorted by name, as the order of a directory differs from one file system to the next.
    named = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    return [Document(name, _as_utf8(path.read_bytes())) for name, path in named]


def _as_utf8(content: bytes) -> bytes:
    """Replace what is no UTF-8, so that all vocabularies and compressors see the same bytes."""
    return content.decode("utf-8", errors="replace").encode()
