"""One safetensors file with the whole weights of a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_moe import __version__
from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.files import NewFile, sync_directory
from lightning_moe.errors import CheckpointError, ConfigError

_SUFFIX = ".safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""What the safetensors format calls them."""


@dataclass(frozen=True)
class Consolidated:
    """What :func:`consolidate` wrote.

    Attributes:
        path: The file.
        checkpoint: The checkpoint that the weights are from.
        step: Optimizer steps that had been taken.
        averaged: Whether they are the average that a weight-averaging callback keeps, not the weights being trained.
        tensors: Number of tensors.
        parameters: Number of values in them, buffers included.
        bytes: Size of the file.
        left_out: Entries of the ``state_dict`` that are no tensors (those of ``get_extra_state``), by name.
    """

    path: Path
    checkpoint: Path
    step: int
    averaged: bool
    tensors: int
    parameters: int
    bytes: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Weights:
    """The weights of a checkpoint: a table of contents, and a way to read one tensor."""

    checkpoint: Path
    step: int
    averaged: bool
    contents: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    left_out: tuple[str, ...]
    read: Callable[[str], Tensor]


def consolidate(
    source: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Consolidated:
    """Write the whole weights of a checkpoint as one safetensors file, in one process.

    Names are those of the LightningModule's ``state_dict``: ``module.load_state_dict(load_file(output))`` works. A
    parameter with several names is written under each. Tensors pass through memory one at a time.

    Args:
        source: A checkpoint directory; a folder of them, which stands for the newest valid one; or a whole-file
            checkpoint of Lightning.
        output: The file, ``*.safetensors``; its folder is created if missing. It appears when it is complete.
        dtype: What to cast floating-point weights to; None keeps each as it was saved.
        overwrite: Whether ``output`` may exist.

    Raises:
        ConfigError: ``output`` exists or has another suffix, or a weight is too large for ``dtype``.
        CheckpointError: ``source`` is no checkpoint or damaged, or ``output`` cannot be written.
    """
    output = Path(output)
    _check_output(output, overwrite)
    weights = _open(Path(source))
    # By size of their elements first, which keeps every tensor aligned in the file, as safetensors itself does.
    contents = {
        name: (dtype if dtype is not None and stored.is_floating_point else stored, shape)
        for name, (stored, shape) in sorted(weights.contents.items(), key=lambda i: (-i[1][0].itemsize, i[0]))
    }
    header = _header(weights, contents)
    # safetensors' own writer wants all tensors at once.
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(partial) as file:
            file.write(header)
            for name, (target, _) in contents.items():
                file.write(_bytes(_cast(name, weights.read(name), target)))
        size = partial.stat().st_size
        os.replace(partial, output)
        sync_directory(output.parent)
    except OSError as error:
        hint = f"check the space in {output.parent} and who may write there"
        raise CheckpointError(output, f"it could not be written: {error.strerror}", hint) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return Consolidated(
        path=output,
        checkpoint=weights.checkpoint,
        step=weights.step,
        averaged=weights.averaged,
        tensors=len(contents),
        parameters=sum(_count(shape) for _, shape in contents.values()),
        bytes=size,
        left_out=weights.left_out,
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != _SUFFIX:
        raise ConfigError("output", str(output), f"a path that ends in {_SUFFIX}", "the checkpoint comes first")
    if output.is_dir() or (output.exists() and not overwrite):
        hint = "it is a directory" if output.is_dir() else "overwrite=True (--force on the command line) replaces it"
        raise ConfigError("output", str(output), "a path where there is nothing yet", hint)


def _open(source: Path) -> _Weights:
    if source.is_file():
        return _open_whole(source)
    if source.is_dir() and not store.is_checkpoint(source):
        return _open_sharded(store.find_newest(source, None))
    return _open_sharded(store.open(source, None))


def _open_sharded(checkpoint: store.Checkpoint) -> _Weights:
    """The section ``model`` of a directory; weight averaging puts the average there and adds a second section."""
    metadata = checkpoint.metadata
    saved: dict[str, dict[str, Any]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        section, *names = metadata.planner_data[key]
        saved.setdefault(section, {}).update({str(name): entry for name in names[:1]})
    contents = {
        name: (entry.properties.dtype, tuple(entry.size))
        for name, entry in saved.get("model", {}).items()
        if isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> Tensor:
        stored, shape = contents[name]
        tensor = torch.empty(shape, dtype=stored)
        checkpoint.read({"model": {name: tensor}})
        return tensor

    averaged = "current_model_state" in saved
    return _Weights(checkpoint.path, checkpoint.step, averaged, contents, _objects(checkpoint), read)


def _objects(checkpoint: store.Checkpoint) -> tuple[str, ...]:
    try:
        return tuple(checkpoint.meta().get("objects_of_state_dict", {}))
    except (CheckpointError, ConfigError):
        return ()  # plain values that need classes of the user's do not matter to the weights


def _open_whole(source: Path) -> _Weights:
    """A file that Lightning, or its consolidation tool, wrote."""
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            source,
            f"it holds more than plain values and tensors: {error}",
            "if you trust it, save its 'state_dict' to a file of its own first",
        ) from error
    except OSError as error:
        raise CheckpointError(source, f"it cannot be read: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(source, f"it is no checkpoint, neither a directory nor a file: {error}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(source, "it has no 'state_dict', as every checkpoint of Lightning does")
    state = checkpoint["state_dict"]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return _Weights(
        checkpoint=source,
        step=int(checkpoint.get("global_step", 0)),
        averaged="current_model_state" in checkpoint,
        contents={name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()},
        left_out=(*(state.keys() - tensors.keys()), *checkpoint.get("objects_of_state_dict", {})),
        read=tensors.__getitem__,
    )


def _header(weights: _Weights, contents: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of the file: its length, then JSON; see github.com/huggingface/safetensors#format."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "step": str(weights.step),
            "checkpoint": weights.checkpoint.name,
            "weights": "averaged" if weights.averaged else "trained",
            "lightning_moe": __version__,
        }
    }
    offset = 0
    for name, (dtype, shape) in contents.items():
        if dtype not in _DTYPES:
            raise ConfigError(f"the weight {name}", str(dtype), "a dtype of the safetensors format")
        end = offset + _count(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.detach().to(dtype)
    if dtype == torch.float16 and cast.isinf().any():
        finite = value.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
        if cast.isinf().logical_and(finite > 0).any():
            largest = f"{name} has a value of {float(finite.max()):.3g}, too large"
            raise ConfigError("dtype", "float16", "bfloat16 or float32", largest)
    return cast


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
