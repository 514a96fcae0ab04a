"""Files whose contents are known: summed while they are written, compared before they are used."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class DamageError(Exception):
    """A file is not what was written; says in words what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file: its size in bytes and the crc32 of its contents."""

    size: int
    crc32: int


class NewFile(io.BufferedWriter):
    """A file that must not exist yet, and is on the disk once it is closed.

    The crc32 is that of the bytes that were handed over, not of what the disk may have made of them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._summed = _SummedFile(os.fspath(path), descriptor)
        super().__init__(self._summed, _BLOCK)

    @property
    def record(self) -> FileRecord:
        """Size and crc32 of what was written; complete when the file is closed."""
        return FileRecord(self._summed.size, self._summed.crc32)

    @property
    def failure(self) -> OSError | None:
        """The first error of writing; libraries on the way may have replaced it by one of theirs."""
        return self._summed.failure

    def close(self) -> None:
        """Write what is buffered, wait for the disk, and close."""
        try:
            if not self.closed:
                self.flush()
                self._summed.sync()
        finally:
            super().close()


class _SummedFile(io.RawIOBase):
    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.size = 0
        self.crc32 = 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def tell(self) -> int:
        return self.size

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        self.crc32 = zlib.crc32(view, self.crc32)
        done = 0
        with self._noting_failure():
            while done < len(view):  # the system may take a part: Linux 2 GiB at a time, a full disk what fits
                done += os.write(self._descriptor, view[done:])
        self.size += len(view)
        return len(view)

    def sync(self) -> None:
        with self._noting_failure():
            os.fsync(self._descriptor)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            named = OSError(error.errno, error.strerror, self._path)  # errors of descriptors do not name the file
            self.failure = self.failure or named
            raise named from error

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file's size and crc32 with what was written.

    Raises:
        DamageError: They differ, or the file cannot be read.
    """
    block = memoryview(bytearray(_BLOCK))
    crc32 = 0
    with _reading(path) as descriptor:
        _compare_size(os.fstat(descriptor).st_size, record)
        while count := os.readv(descriptor, [block]):
            crc32 = zlib.crc32(block[:count], crc32)
    _compare_crc32(crc32, record)


def read_checked(path: Path, record: FileRecord) -> bytes:
    """The contents of a file that is as it was written.

    Raises:
        DamageError: As :func:`check_file`.
    """
    with _reading(path) as descriptor:
        _compare_size(os.fstat(descriptor).st_size, record)
        data = _read(descriptor)
    _compare_crc32(zlib.crc32(data), record)
    return data


def read_file(path: Path) -> bytes:
    """The contents of a regular file.

    Raises:
        DamageError: There is none, or it cannot be read.
    """
    with _reading(path) as descriptor:
        return _read(descriptor)


def _read(descriptor: int) -> bytes:
    return b"".join(iter(lambda: os.read(descriptor, _BLOCK), b""))


def _compare_size(size: int, record: FileRecord) -> None:
    if size != record.size:
        raise DamageError(f"is damaged: it has {size} bytes, and {record.size} were written")


def _compare_crc32(crc32: int, record: FileRecord) -> None:
    if crc32 != record.crc32:
        raise DamageError("is damaged: its contents are not those that were written")


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    """Open a regular file: a link could lead out of the checkpoint, and reading a pipe could wait for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        match error.errno:
            case errno.ENOENT:
                raise DamageError("is missing") from error
            case errno.ELOOP:
                raise DamageError("is a link, not a file of this checkpoint") from error
            case _:
                raise DamageError(f"cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamageError("is no regular file")
        yield descriptor
    except OSError as error:
        raise DamageError(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for directories; their servers keep names safe themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names, in one step that a kill cannot interrupt.

    Returns:
        Whether the kernel, the C library and the file system can do that; nothing has happened where they cannot.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    result = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(first), None, os.fspath(second))
