"""The list of a checkpoint's files, with what tells whether they are still those that were written."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lightning_moe.checkpoint.files import DamageError, FileRecord, read_file

MANIFEST = "manifest.json"
METADATA = ".metadata"
"""DCP's table of contents: which tensors there are, and where their chunks are."""
META = "meta.pt"
"""Plain values beside the tensors."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint: it is written after all other files are on disk.

    Attributes:
        step: Optimizer steps so far.
        epoch: Epoch, where the plain values name one.
        time_ns: When it was written, in nanoseconds since 1970.
        files: Every other file of the directory, by plain name.
    """

    step: int
    epoch: int | None
    time_ns: int
    files: Mapping[str, FileRecord]

    def dumps(self) -> bytes:
        """The file's contents; they end with the crc32 of all that stands before."""
        body = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "epoch": self.epoch,
            "time_ns": self.time_ns,
            "files": {
                name: {"size": record.size, "crc32": f"{record.crc32:08x}"}
                for name, record in sorted(self.files.items())
            },
        }
        return _dump({**body, "crc32": f"{zlib.crc32(_dump(body)):08x}"})

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """Read a file's contents.

        Raises:
            ValueError: They are not exactly what :meth:`dumps` wrote; says what is wrong.
        """
        try:
            body = json.loads(data)
            version = _count(body["format_version"])
            manifest = cls._of(body) if version <= FORMAT_VERSION else None
        # What a damaged or hostile file may raise on the way: wrong types, missing keys, nesting without end.
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError("is no list of a checkpoint's files") from error
        if manifest is None:
            raise ValueError(f"is of format version {version}, and this release reads {FORMAT_VERSION}")
        if manifest.dumps() != data:
            raise ValueError("is damaged: it is not as it was written")
        return manifest

    @classmethod
    def _of(cls, body: Mapping[str, Any]) -> Self:
        return cls(
            step=_count(body["step"]),
            epoch=None if body["epoch"] is None else _count(body["epoch"]),
            time_ns=_count(body["time_ns"]),
            files={_plain(name): _record(record) for name, record in body["files"].items()},
        )


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamageError: There is none, or it is not as it was written.
    """
    data = read_file(directory / MANIFEST)
    try:
        return Manifest.loads(data)
    except ValueError as error:
        raise DamageError(str(error)) from error


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a checkpoint; damaged ones do."""
    # Not Path.is_file, which raises where one may not look, e.g. in lost+found.
    return any(os.path.isfile(path / name) for name in (MANIFEST, METADATA, META))


def step_of(path: Path) -> str:
    """The step that a checkpoint's name tells, as ModelCheckpoint writes it: ``"step 10"`` or ``"unknown step"``."""
    step = step_in_name(path)
    return "unknown step" if step is None else f"step {step}"


def step_in_name(path: Path) -> int | None:
    """The number in ``epoch=0-step=10.ckpt``; None if there is none."""
    steps = re.findall(r"step=(\d{1,18})", path.name)
    return int(steps[-1]) if steps else None


def _dump(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _plain(name: str) -> str:
    """A file name that cannot lead out of the directory, nor to the manifest itself."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", name) or name in (".", "..", MANIFEST):
        raise ValueError
    return name


def _record(record: Mapping[str, Any]) -> FileRecord:
    return FileRecord(_count(record["size"]), int(record["crc32"], 16))
