"""Checkpoints that somebody made to run code, or to reach files outside: none of it happens.

Every one has a valid manifest, because who can write a checkpoint can also count its bytes. Code that runs makes a
directory, the canary. For attacks on the table of contents a first test shows that they are real: DCP's own reader
runs them.
"""

from __future__ import annotations

import copyreg
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.files import FileRecord
from lightning_moe.checkpoint.manifest import Manifest, load_manifest
from lightning_moe.errors import CheckpointError, ConfigError
from tests.checkpoint.attacks import CONTENTS, EXTENSION, PLAIN_VALUES, global_name, tensor_of, text
from tests.checkpoint.known import check, save


def forge(directory: Path, **files: bytes) -> None:
    """Replace files, and make the manifest right."""
    for name, data in files.items():
        (directory / name).write_bytes(data)
    records = {
        file.name: FileRecord(file.stat().st_size, zlib.crc32(file.read_bytes()))
        for file in directory.iterdir()
        if file.name != "manifest.json"
    }
    manifest = replace(load_manifest(directory), files=records)
    (directory / "manifest.json").write_bytes(manifest.dumps())


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A checkpoint, still as it was written."""
    save(tmp_path / "step=1.ckpt", 1)
    return tmp_path / "step=1.ckpt"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What the attacks make."""
    return tmp_path / "canary"


@pytest.fixture
def extension() -> Iterator[None]:
    """A process in which a dangerous function has a number for pickles."""
    copyreg.add_extension("os", "mkdir", EXTENSION)
    yield
    copyreg.remove_extension("os", "mkdir", EXTENSION)
    copyreg.clear_extension_cache()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("attack", CONTENTS)
def test_table_of_contents(victim: Path, canary: Path, attack: str) -> None:
    forge(victim, **{".metadata": CONTENTS[attack](victim, str(canary))})
    with suppress(Exception):
        FileSystemReader(victim).read_metadata()
    assert canary.is_dir(), "the attack is no real one"
    canary.rmdir()
    with pytest.raises(CheckpointError, match=r"step=1\.ckpt: file '\.metadata' of step 1 (names|has|is) "):
        store.open(victim, None)
    with pytest.warns(UserWarning, match=r"file '\.metadata' of step 1"), pytest.raises(CheckpointError):
        store.find_newest(victim.parent, None)
    assert not canary.exists()


CLASSES = (ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata, _StorageInfo)


@pytest.mark.parametrize("target", [(kind.__module__, kind.__name__) for kind in CLASSES] + [("torch", "Size")])
def test_classes_cannot_be_changed(victim: Path, target: tuple[str, str]) -> None:
    """What ``BUILD`` sets on a class would stay when the checkpoint is long refused, and spoil what is saved next."""
    changed = global_name(*target) + b"N}" + text("canary") + text("changed") + b"s\x86b"
    forge(victim, **{".metadata": b"\x80\x04" + changed + b"."})
    with pytest.raises(CheckpointError, match=r"file '\.metadata' of step 1"):
        store.open(victim, None)
    assert not any(hasattr(kind, "canary") for kind in (*CLASSES, torch.Size))
    save(victim, 2)
    check(store.open(victim, None), 2)


def test_numbers_for_names_are_not_remembered(victim: Path) -> None:
    """Or a number that stands for an allowed name would stand for ours in other people's pickles."""
    copyreg.add_extension("torch", "Size", EXTENSION)
    try:
        forge(victim, **{".metadata": b"\x80\x04\x82" + bytes([EXTENSION]) + b"."})
        with pytest.raises(CheckpointError):
            store.open(victim, None)
        assert pickle.loads(pickle.dumps(torch.Size, protocol=2)) is torch.Size
    finally:
        copyreg.remove_extension("torch", "Size", EXTENSION)
        copyreg.clear_extension_cache()


# ---- plain values and tensors


AS_PROGRAM = pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript")


@AS_PROGRAM
@pytest.mark.parametrize("attack", PLAIN_VALUES)
@pytest.mark.parametrize("weights_only", [None, True])
def test_plain_values(victim: Path, canary: Path, attack: str, weights_only: bool | None) -> None:
    forge(victim, **{"meta.pt": PLAIN_VALUES[attack](str(canary))})
    checkpoint = store.open(victim, None)
    with pytest.raises((CheckpointError, ConfigError), match=r"meta\.pt"):
        checkpoint.meta(weights_only)
    assert not canary.exists()


def test_the_environment_does_not_open_the_door(victim: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    forge(victim, **{"meta.pt": PLAIN_VALUES["call"](str(canary))})
    with pytest.raises(ConfigError, match="could run code"):
        store.open(victim, None).meta()
    assert not canary.exists()


@AS_PROGRAM
@pytest.mark.parametrize("key", ["model.low", "optimizer_0.name"], ids=["tensor", "value"])
@pytest.mark.parametrize("attack", ["call", "tensor", "bare pickle", "old format", "program", "rubbish"])
def test_tensors_and_values_among_them(victim: Path, canary: Path, key: str, attack: str) -> None:
    data = PLAIN_VALUES[attack](str(canary)).ljust(4096, b"\0")
    metadata = FileSystemReader(victim).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == key)
    metadata.storage_data[index] = _StorageInfo("__9_0.distcp", 0, len(data))
    forge(victim, **{"__9_0.distcp": data, ".metadata": pickle.dumps(metadata)})
    checkpoint = store.open(victim, None)
    section, field = key.split(".")
    with pytest.raises(CheckpointError, match=r"step=1\.ckpt: .*(running code|could not read it)"):
        checkpoint.read({section: {field: torch.zeros(33).bfloat16() if key == "model.low" else None}})
    assert not canary.exists()


# ---- files outside, and memory without end


def change(victim: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = FileSystemReader(victim).read_metadata()
    edit(metadata)
    forge(victim, **{".metadata": pickle.dumps(metadata)})


LOW = MetadataIndex("model.low", [0])


@pytest.mark.parametrize(
    "path", ["../outside.ckpt/__0_0.distcp", "/etc/passwd", "{outside}/__0_0.distcp", "__7_0.distcp", "", ".", "a\0b"]
)
def test_tensors_in_files_that_are_not_listed(victim: Path, path: str) -> None:
    save(victim.parent / "outside.ckpt", 2)
    path = path.format(outside=victim.parent / "outside.ckpt")
    change(victim, lambda metadata: setattr(metadata.storage_data[LOW], "relative_path", path))
    with pytest.raises(CheckpointError, match="names a file that is not in the manifest"):
        store.open(victim, None)


@pytest.mark.parametrize("path", ["../outside.ckpt/__0_0.distcp", "/etc/passwd", "{outside}/__0_0.distcp"])
def test_manifests_that_list_files_outside(victim: Path, path: str) -> None:
    save(victim.parent / "outside.ckpt", 2)
    path = path.format(outside=victim.parent / "outside.ckpt")
    change(victim, lambda metadata: setattr(metadata.storage_data[LOW], "relative_path", path))
    data = Path(victim, path).read_bytes()
    manifest = load_manifest(victim)
    listed = {**manifest.files, path: FileRecord(len(data), zlib.crc32(data))}
    (victim / "manifest.json").write_bytes(Manifest(1, 0, 1, listed).dumps())
    with pytest.raises(CheckpointError, match=r"file 'manifest\.json' of step 1 is no list"):
        store.open(victim, None)


def test_links_that_lead_outside(victim: Path) -> None:
    secret = victim.parent / "secret"
    (victim / "__0_0.distcp").rename(secret)
    (victim / "__0_0.distcp").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"file '__0_0\.distcp' of step 1 is a link"):
        store.open(victim, None)


def set_size(metadata: Metadata, size: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    entry = tensor_of(metadata)
    entry.size = torch.Size(size)
    entry.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]


SIZES: dict[str, Callable[[Metadata], None]] = {
    "a tensor of 4 TiB": lambda metadata: set_size(metadata, (2**41,), [((0,), (2**41,))]),
    "parts of 4 TiB that do not exist": lambda metadata: set_size(metadata, (2**41,), [((0,), (33,))]),
    "a part outside": lambda metadata: set_size(metadata, (33,), [((0,), (34,))]),
    "a part missing": lambda metadata: set_size(metadata, (66,), [((0,), (33,))]),
    "parts of other dims": lambda metadata: set_size(metadata, (33,), [((0, 0), (33, 1))]),
    "no parts": lambda metadata: set_size(metadata, (33,), []),
    "many tensors in the same bytes": lambda metadata: [  # type: ignore[func-returns-value]
        (
            metadata.state_dict_metadata.update({f"x{i}": tensor_of(metadata)}),
            metadata.planner_data.update({f"x{i}": ("x", i)}),
            metadata.storage_data.update({MetadataIndex(f"x{i}", [0]): metadata.storage_data[LOW]}),
        )
        for i in range(1000)
    ],
    "beyond the file": lambda metadata: setattr(metadata.storage_data[LOW], "offset", 2**40),
    "before the file": lambda metadata: setattr(metadata.storage_data[LOW], "offset", -1),
    "longer than the file": lambda metadata: setattr(metadata.storage_data[LOW], "length", 2**40),
    "shorter than the tensor": lambda metadata: setattr(metadata.storage_data[LOW], "length", 10),
    "nowhere": lambda metadata: metadata.storage_data.pop(LOW),
    "a value nowhere": lambda metadata: metadata.storage_data.pop(MetadataIndex("optimizer_0.name")),
    "no name": lambda metadata: metadata.planner_data.pop("model.low"),
    "a transformation": lambda metadata: setattr(metadata.storage_data[LOW], "transform_descriptors", ["zstd"]),
    "a number too large": lambda metadata: setattr(metadata.storage_data[LOW], "length", 2**80),
}


@pytest.mark.parametrize("attack", SIZES)
def test_sizes(victim: Path, attack: str) -> None:
    """Nobody may be asked for memory that the files cannot fill, or be given tensors that are filled in part."""
    change(victim, SIZES[attack])
    with pytest.raises(
        CheckpointError, match=r"file '\.metadata' of step 1 (does not|promises|has|puts|names|asks|is no table)"
    ):
        store.open(victim, None)


def test_an_unchanged_copy_is_read(victim: Path) -> None:
    """The forger's tools alone do not make a checkpoint that is refused."""
    change(victim, lambda metadata: None)
    check(store.open(victim, None), 1)
