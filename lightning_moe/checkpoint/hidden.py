"""Hidden directories beside checkpoints: what is being written, replaced or removed, and by which process.

Their names tell what they were for and who made them, so that a later run knows what to do with those of a process
that was killed: ``.last.ckpt.staging-<host>-<process>-<start of the process>-<random>``.
"""

from __future__ import annotations

import os
import re
import secrets
import zlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self


class Kind(StrEnum):
    """What a hidden directory is for."""

    STAGING = "staging"
    """Becomes the checkpoint of its name; or was it, until the two were swapped."""
    REPLACED = "replaced"
    """Was the checkpoint of its name, until the next one takes its place."""
    REMOVED = "removed"
    """Is being deleted; may hold a part only."""


_NAME = re.compile(rf"\.(?P<name>.+)\.(?P<kind>{'|'.join(Kind)})-(?P<host>\w+)-(?P<pid>\d+)-(?P<start>\d+)-\w+")


@dataclass(frozen=True)
class Hidden:
    """A hidden directory, or link.

    Attributes:
        path: Where it is.
        visible: The checkpoint that it was made for.
        kind: What it is for.
        alive: Whether the process that made it still runs; None if it ran on another host.
    """

    path: Path
    visible: Path
    kind: Kind
    alive: bool | None

    @classmethod
    def parse(cls, path: Path) -> Self | None:
        """What the name tells; None if it is another kind of name."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        alive = _start_of(int(match["pid"])) == match["start"] if match["host"] == _host() else None
        return cls(path, path.parent / match["name"], Kind(match["kind"]), alive)


def new_hidden(visible: Path, kind: Kind) -> Path:
    """A name that no other process or thread chooses, in the same directory and so on the same file system."""
    pid = os.getpid()
    owner = f"{_host()}-{pid}-{_start_of(pid)}"
    return visible.parent / f".{visible.name}.{kind}-{owner}-{secrets.token_hex(4)}"


def find_hidden(folder: Path) -> list[Hidden]:
    """All hidden directories in a folder of checkpoints, by name."""
    parsed = (Hidden.parse(path) for path in sorted(folder.iterdir()))
    return [hidden for hidden in parsed if hidden is not None]


def _host() -> str:
    """Tells hosts apart, and containers of one host, whose process numbers mean different processes."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{os.uname().nodename} {namespace}'.encode()):08x}"


def _start_of(pid: int) -> str | None:
    """When a process started, in the clock ticks of the system, or 0 where it does not say; None if it runs no more.

    In containers a process number alone is that of the killed run as often as not.
    """
    if not os.path.exists("/proc/self/stat"):
        return "0" if _exists(pid) else None
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name of the program comes second, in parentheses, and may contain anything.
            state, *fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, and is another user's
    return True
