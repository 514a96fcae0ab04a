"""What attackers put into checkpoints: code that makes a directory, the canary, when it is loaded without care."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

EXTENSION = 0x7F


class MadeByNew:
    """Code that is on the victim's machine anyway: making an object has an effect."""

    def __new__(cls, path: str) -> MadeByNew:
        os.mkdir(path)
        return super().__new__(cls)


class MadeByState:
    """The same, when the object gets its state."""

    def __setstate__(self, path: str) -> None:
        os.mkdir(path)


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def text(value: str) -> bytes:
    """Opcode for a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def global_name(module: str, attribute: str) -> bytes:
    """Opcodes for a name, dotted ones as well."""
    return text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def load_module(module: str) -> bytes:
    return call(global_name("builtins", "__import__"), text(module))


def hub(canary: str) -> bytes:
    folder = Path(canary).parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"import os\nos.mkdir({canary!r})\ndef entry(): pass\n")
    return call(global_name("torch.hub", "_load_local"), text(str(folder)), text("entry"))


PICKLES: dict[str, Callable[[str], bytes]] = {
    "GLOBAL": lambda canary: call(b"cos\nmkdir\n", text(canary)),
    "STACK_GLOBAL": lambda canary: call(global_name("os", "mkdir"), text(canary)),
    "INST": lambda canary: b"(" + text(canary) + b"ios\nmkdir\n",
    "OBJ": lambda canary: b"(" + global_name("tests.checkpoint.attacks", "MadeByNew") + text(canary) + b"o",
    "NEWOBJ": lambda canary: global_name("tests.checkpoint.attacks", "MadeByNew") + b"(" + text(canary) + b"t\x81",
    "NEWOBJ_EX": lambda canary: (
        global_name("tests.checkpoint.attacks", "MadeByNew") + b"(" + text(canary) + b"t" + b"}\x92"
    ),
    "BUILD": lambda canary: global_name("tests.checkpoint.attacks", "MadeByState") + b")\x81" + text(canary) + b"b",
    "EXT1": lambda canary: call(b"\x82" + bytes([EXTENSION]), text(canary)),
    "EXT2": lambda canary: call(b"\x83" + struct.pack("<H", EXTENSION), text(canary)),
    "EXT4": lambda canary: call(b"\x84" + struct.pack("<i", EXTENSION), text(canary)),
    "os.system": lambda canary: call(global_name("os", "system"), text(f"mkdir {canary}")),
    "posix.system": lambda canary: call(global_name("posix", "system"), text(f"mkdir {canary}")),
    "subprocess.call": lambda canary: call(
        global_name("subprocess", "call"), b"(" + text("mkdir") + text(canary) + b"l"
    ),
    "builtins.eval": lambda canary: call(global_name("builtins", "eval"), text(f"__import__('os').mkdir({canary!r})")),
    "builtins.exec": lambda canary: call(global_name("builtins", "exec"), text(f"import os\nos.mkdir({canary!r})")),
    "builtins.getattr": lambda canary: call(
        call(global_name("builtins", "getattr"), load_module("os"), text("mkdir")), text(canary)
    ),
    "functools.partial": lambda canary: call(
        call(global_name("functools", "partial"), global_name("os", "mkdir"), text(canary)),
    ),
    "operator.attrgetter": lambda canary: call(
        call(call(global_name("operator", "attrgetter"), text("mkdir")), load_module("os")), text(canary)
    ),
    "operator.methodcaller": lambda canary: call(
        call(global_name("operator", "methodcaller"), text("mkdir"), text(canary)), load_module("os")
    ),
    "dotted under torch": lambda canary: call(global_name("torch", "os.mkdir"), text(canary)),
    "dotted under torch.serialization": lambda canary: call(
        global_name("torch.serialization", "os.mkdir"), text(canary)
    ),
    "dotted under DCP's metadata": lambda canary: call(
        global_name("torch.distributed.checkpoint.metadata", "os.mkdir"), text(canary)
    ),
    "dotted under DCP's file system": lambda canary: call(
        global_name("torch.distributed.checkpoint.filesystem", "os.mkdir"), text(canary)
    ),
    "torch.hub": hub,
}
"""Opcodes that make the canary when they are loaded."""


class Nested:
    """Code deep in a table of contents that is otherwise right."""

    def __init__(self, place: Callable[[Metadata, Any], None]) -> None:
        self.place = place

    def __call__(self, directory: Path, canary: str) -> bytes:
        metadata = FileSystemReader(directory).read_metadata()
        self.place(metadata, Call(os.mkdir, canary))
        return pickle.dumps(metadata)


def replace_field(path: Callable[[Metadata], Any], field: str) -> Callable[[Metadata, Any], None]:
    return lambda metadata, evil: object.__setattr__(path(metadata), field, evil)


def tensor_of(metadata: Metadata) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata["model.low"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


NESTED: dict[str, Callable[[Metadata, Any], None]] = {
    "planner data": lambda metadata, evil: metadata.planner_data.update({"model.low": ("model", evil)}),
    "key": lambda metadata, evil: metadata.planner_data.update({evil: ("model", "low")}),
    "place": lambda metadata, evil: metadata.storage_data.update({MetadataIndex("x"): evil}),
    "file": replace_field(lambda metadata: metadata.storage_data[MetadataIndex("model.low", [0])], "relative_path"),
    "dtype": replace_field(lambda metadata: tensor_of(metadata).properties, "dtype"),
    "layout": replace_field(lambda metadata: tensor_of(metadata).properties, "layout"),
    "pinned": replace_field(lambda metadata: tensor_of(metadata).properties, "pin_memory"),
    "size": replace_field(tensor_of, "size"),
    "chunks": replace_field(tensor_of, "chunks"),
    "version": replace_field(lambda metadata: metadata, "version"),
    "checkpoint id": replace_field(lambda metadata: metadata.storage_meta, "checkpoint_id"),
    "unknown field": replace_field(lambda metadata: metadata, "unknown"),
}

CONTENTS: dict[str, Callable[[Path, str], bytes]] = {
    **{
        name: lambda directory, canary, body=body: b"\x80\x04" + body(canary) + b"."  # type: ignore[misc]
        for name, body in PICKLES.items()
    },
    **{f"in {name}": Nested(place) for name, place in NESTED.items()},
}
"""Tables of contents that run code when they are loaded with ``pickle.load``."""


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def evil(canary: str) -> bytes:
    return pickle.dumps(Call(os.mkdir, canary), protocol=2)


def program(canary: str) -> bytes:
    """An archive of a compiled program, which torch.load runs if it may."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (("constants.pkl", evil(canary)), ("data.pkl", evil(canary)), ("version", b"3\n")):
            archive.writestr(f"program/{name}", data)
    return buffer.getvalue()


PLAIN_VALUES: dict[str, Callable[[str], bytes]] = {
    "call": lambda canary: torch_saved({"x": Call(os.mkdir, canary)}),
    "call of an allowed name": lambda canary: torch_saved({"x": Call(torch.hub._load_local, canary, "entry")}),
    "key": lambda canary: torch_saved({Call(os.mkdir, canary): 1}),
    "tensor": lambda canary: torch_saved({"x": [torch.zeros(1), Call(eval, f"__import__('os').mkdir({canary!r})")]}),
    "bare pickle": evil,
    "old format": lambda canary: b"".join(
        [*(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {})), evil(canary)]
    ),
    "program": program,
    "no dictionary": lambda canary: torch_saved([1, 2]),
    "rubbish": lambda canary: b"PK\x03\x04" + bytes(100),
    "nothing": lambda canary: b"",
}
