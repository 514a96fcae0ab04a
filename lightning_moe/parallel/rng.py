"""Random streams with a known relation between ranks: equal for replicated activations, else different."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh

# [Note: which coordinates go into which stream]
# Random numbers drawn in forward (dropout) must differ between ranks that work on different activations, or
# the ranks drop the same units of different samples; and must agree between ranks that hold copies of one
# activation, or the copies, and with them the gradients of replicated weights, drift apart. So the seed of a
# stream folds in a rank's coordinates on just those dense axes along which the activations differ:
#
#   stream       folds in                          for activations that are
#   replicated   pipeline, data, context           equal over the tensor axis (residual stream)
#   sharded      pipeline, data, context, tensor   different on every rank (heads, expert rows)
#
# The expert axes fold the same ranks a second time, so their coordinates would add nothing; nothing may be
# drawn for activations that are replicated over expert_tensor. Initial weights use no stream of a rank: see
# `sharded_init_`.
_STREAMS: Mapping[str, tuple[Axis, ...]] = {
    "replicated": (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT),
    "sharded": (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT, Axis.TENSOR),
}

_NUMPY_DEFAULT = "MT19937"
"""The only kind of NumPy's global generator that is captured; ``numpy.random.set_bit_generator`` can replace it."""


def fold_seed(seed: SupportsIndex, *parts: str | SupportsIndex) -> int:
    """Derive a seed from ``seed`` and ``parts`` by a 63-bit hash that every process and release agrees on.

    Args:
        seed: Base seed.
        *parts: Strings and integers, in order, that tell this seed from others, e.g. axis and coordinate.

    Returns:
        An integer in ``[0, 2**63)``, which every torch generator accepts.
    """
    # NumPy integers and string enumerations have their own repr; the seed must depend on the value alone.
    values = tuple(str(part) if isinstance(part, str) else index(part) for part in parts)
    digest = hashlib.blake2b(repr((index(seed), *values)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class AxisRng:
    """One rank's random streams for draws in forward, e.g. of dropout.

    The stream ``"replicated"`` gives equal numbers to ranks that hold copies of one activation (those along
    the ``tensor`` axis) and different ones to all others; ``"sharded"`` gives different numbers to each rank.
    Outside :meth:`fork` torch's default generators are untouched.

    Args:
        mesh: The mesh that says where this rank stands.
        seed: Base seed, the same on every rank.
    """

    def __init__(self, mesh: ParallelMesh, seed: int) -> None:
        self._seeds = {
            name: fold_seed(seed, name, *(part for axis in axes for part in (axis, mesh.rank(axis))))
            for name, axes in _STREAMS.items()
        }
        # Generator states by device type; that of a CUDA device appears when a stream is first used with one.
        self._states = {name: {"cpu": _initial_state(seed, "cpu")} for name, seed in self._seeds.items()}
        self._in_use: set[str] = set()

    @contextmanager
    def fork(self, stream: str) -> Iterator[None]:
        """Let torch's default generators (CPU's, and the current CUDA device's once in use) be ``stream``.

        The stream goes on where its last use ended; the generators get their own states back in the end, also
        after an exception.

        Raises:
            ConfigError: There is no such stream.
            RuntimeError: The stream is in use already; both uses would draw the same numbers.
        """
        if stream not in self._states:
            raise ConfigError("rng.stream", stream, "one of " + ", ".join(self._states))
        if stream in self._in_use:
            raise RuntimeError(f"random stream {stream!r} is in use already; do not nest fork({stream!r})")
        states, outside = self._states[stream], _default_states()
        for device_type in outside:
            if device_type not in states:
                states[device_type] = _initial_state(self._seeds[stream], device_type)
        self._in_use.add(stream)
        _set_default_states({device_type: states[device_type] for device_type in outside})
        try:
            yield
        finally:
            now = _default_states()
            states.update({device_type: now[device_type] for device_type in outside})
            _set_default_states(outside)
            self._in_use.discard(stream)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """States of this rank's streams: ``{stream: {device type: uint8 state}}``."""
        return _copy(self._states)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue where :meth:`state_dict` was taken, by the same rank of the same mesh.

        Raises:
            ConfigError: The names of the streams differ.
        """
        if state.keys() != self._states.keys():
            raise ConfigError("rng.state_dict", sorted(state), "the streams " + ", ".join(self._states))
        self._states = _copy(state)


def capture_generators(device: torch.device | None = None) -> dict[str, Any]:
    """States of this process' default generators: Python's ``random``, NumPy's legacy one, and torch's.

    Args:
        device: A CUDA device whose generator is wanted too, beside that of the CPU.

    Returns:
        Copies, as plain values that ``torch.load(weights_only=True)`` reads.
    """
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": {"version": version, "words": torch.from_numpy(np.array(words)), "gauss": gauss},
        "cpu": torch.get_rng_state(),
    }
    legacy: Any = np.random.get_state(legacy=False)
    if legacy["bit_generator"] == _NUMPY_DEFAULT:
        states["numpy"] = {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        }
    # Asking an unused CUDA for its state would create a context.
    if device is not None and device.type == "cuda" and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Continue where :func:`capture_generators` was called; generators without a state there are left alone.

    Args:
        states: What it returned.
        device: The CUDA device whose generator is meant.
    """
    python = states["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(states["cpu"].cpu())
    if "numpy" in states and np.random.get_state(legacy=False)["bit_generator"] == _NUMPY_DEFAULT:
        legacy = states["numpy"]
        np.random.set_state(
            {
                "bit_generator": _NUMPY_DEFAULT,
                "state": {"key": legacy["key"].numpy().astype(np.uint32), "pos": legacy["pos"]},
                "has_gauss": legacy["has_gauss"],
                "gauss": legacy["gauss"],
            }
        )
    if "cuda" in states and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _initial_state(seed: int, device_type: str) -> Tensor:
    return torch.Generator(device_type).manual_seed(seed).get_state()


def _copy(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    # Generator states are CPU tensors, also those of CUDA; a checkpoint may have been loaded elsewhere.
    return {name: {kind: state.cpu().clone() for kind, state in by.items()} for name, by in states.items()}


def _default_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    # Asking an unused CUDA for its state would create a context.
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_default_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
