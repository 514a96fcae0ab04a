"""DCP's table of contents, read without trusting it.

The file is a pickle, and DCP loads it with ``pickle.load``, which runs whatever code the file names. Here only exact
names of DCP's own classes are known, and none of them is built: each stands for a record without any behaviour, from
which the real objects are built once every field has the type it must have.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Mapping
from math import prod
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_moe.checkpoint.files import FileRecord

_T = TypeVar("_T")

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_RECORDS = frozenset(
    {
        (_METADATA_MODULE, "BytesStorageMetadata"),
        (_METADATA_MODULE, "ChunkStorageMetadata"),
        (_METADATA_MODULE, "Metadata"),
        (_METADATA_MODULE, "MetadataIndex"),
        (_METADATA_MODULE, "StorageMeta"),
        (_METADATA_MODULE, "TensorProperties"),
        (_METADATA_MODULE, "TensorStorageMetadata"),
        (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        # Python before 3.11.4 writes enumerations as getattr(class, name). It stands for a record like all others.
        ("builtins", "getattr"),
    }
)
_DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))


class MetadataError(Exception):
    """A table of contents that DCP did not write for these files; says in words why."""


def load_metadata(data: bytes, files: Mapping[str, FileRecord]) -> Metadata:
    """Read the contents of a ``.metadata`` file.

    Args:
        data: The file's contents.
        files: The files of the checkpoint; every tensor must lie within one of them.

    Raises:
        MetadataError: The file names code, or is otherwise not what DCP writes.
    """
    # Numbers in a pickle may stand for objects that a process has registered. Of those known from an earlier pickle
    # the unpickler would not ask for the name; and it would remember ours.
    copyreg.clear_extension_cache()
    try:
        root = _Unpickler(io.BytesIO(data)).load()
        return _build(root, files)
    except MetadataError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        raise MetadataError(f"is no table of contents: {type(error).__name__}") from error
    finally:
        copyreg.clear_extension_cache()


class _Record:
    """What an allowed name stands for while a pickle is read: the arguments and the state that it gives."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows exact names only, and gives records for them: classes of its own, so that nothing outlives the file."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes = {names: type(names[1], (_Record,), {}) for names in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._classes:
            return self._classes[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        raise MetadataError(f"names {module[:80]}.{name[:80]}, which could run code")


def _build(root: Any, files: Mapping[str, FileRecord]) -> Metadata:
    """DCP's objects, if every field of the records has the type and the range that it must have."""
    fields = _fields(root, "Metadata")
    described = _exactly(fields["state_dict_metadata"], dict)
    entries = {_exactly(key, str): _entry(value) for key, value in described.items()}
    paths = {_exactly(key, str): _path(value) for key, value in _exactly(fields["planner_data"], dict).items()}
    places = {_index(key): _place(value, files) for key, value in _exactly(fields["storage_data"], dict).items()}
    if not entries.keys() <= paths.keys():
        raise MetadataError("has an entry without a name")
    if sum(place.length for place in places.values()) > sum(record.size for record in files.values()):
        raise MetadataError("promises more bytes than the files have")
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_chunks(key, entry, places)
        elif MetadataIndex(key) not in places:
            raise MetadataError(f"does not say where {key!r} is")
    return Metadata(entries, paths, places, StorageMeta(), _exactly(fields["version"], str))


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    dtype, *_ = fields["properties"].state  # the other properties are deprecated, and nobody asks for them
    chunks = []
    for chunk in _exactly(fields["chunks"], list):
        parts = _fields(chunk, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_size(parts["offsets"]), _size(parts["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype=_exactly(dtype, torch.dtype)), _size(fields["size"]), chunks)


def _check_chunks(key: str, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """The chunks must fill the tensor, and have their bytes in the files.

    Otherwise memory would be asked for that no file can fill, or parts of a tensor would keep what they held before.
    """
    filled = 0
    for chunk in entry.chunks:
        ends = [offset + length for offset, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > length for end, length in zip(ends, entry.size, strict=True)):
            raise MetadataError(f"puts a part of {key!r} outside of it")
        place = places.get(MetadataIndex(key, chunk.offsets))
        if place is None or prod(chunk.sizes) * entry.properties.dtype.itemsize > place.length:
            raise MetadataError(f"does not say where all of {key!r} is")
        filled += prod(chunk.sizes)
    if filled != prod(entry.size):
        raise MetadataError(f"has parts of {key!r} only")


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_exactly(fields["fqn"], str), None if offset is None else _size(offset))


def _place(record: Any, files: Mapping[str, FileRecord]) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    name = _exactly(fields["relative_path"], str)
    if name not in files:
        raise MetadataError(f"names a file that is not in the manifest: {name[:80]!r}")
    place = _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))
    if place.offset + place.length > files[name].size:
        raise MetadataError(f"names bytes that {name} does not have")
    if fields.get("transform_descriptors") is not None:
        raise MetadataError("asks for a transformation of the files")
    return place


def _path(value: Any) -> tuple[str | int, ...]:
    path = _exactly(value, tuple)
    if not path or any(type(part) not in (str, int) for part in path):
        raise MetadataError("has an entry without a name")
    return path


def _size(value: Any) -> torch.Size:
    return torch.Size([_count(length) for length in _exactly(value, tuple)])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise MetadataError("has a number that is no size")
    return value


def _fields(record: Any, name: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != name:
        raise MetadataError(f"has something else where a {name} must be")
    return _exactly(record.state, dict)


def _exactly(value: Any, kind: type[_T]) -> _T:
    if type(value) is not kind:
        raise MetadataError(f"has a {type(value).__name__} where a {kind.__name__} must be")
    return value
