"""Marking parameters that are sharded over an axis, and initialising them independently of the topology."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, axis_named
from lightning_moe.parallel.rng import fold_seed

# [Note: where shard specs live]
# A spec belongs to (module, parameter name), not to the parameter object: deepcopy, pickling and weight averaging build
# new Parameter objects without their attributes, and a spec that got lost would let an expert's gradient be reduced
# over the wrong ranks without any error.
_SPECS_ATTRIBUTE = "_shard_specs"


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter of this rank relates to the whole ("logical") tensor.

    Args:
        axis: Mesh axis that the parameter is sharded over, e.g. ``"expert"``.
        dim: Tensor dim that is sharded.
        size: Length of that dim in the whole tensor, e.g. the number of experts.
        index: Logical positions along ``dim`` that this rank holds, in local order.
    """

    axis: str
    dim: int
    size: int
    index: tuple[int, ...]

    def __post_init__(self) -> None:
        axis_named(self.axis)
        if any(not 0 <= i < self.size for i in self.index) or len(set(self.index)) != len(self.index):
            raise ConfigError("shard_spec.index", self.index, f"distinct positions in [0, {self.size})")

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every position."""
        return len(self.index) == self.size


def set_shard_spec(module: nn.Module, name: str, spec: ShardSpec) -> None:
    """Mark ``module``'s own parameter ``name`` as sharded.

    A marked parameter's gradient is reduced over its replicas only (``expert_data`` for the axis ``expert``), counted
    once in the gradient norm, and saved and loaded by logical position. Unmarked parameters are dense.

    Raises:
        ConfigError: There is no such parameter, or its length along ``spec.dim`` is not that of ``spec.index``.
    """
    parameter = module._parameters.get(name)
    if parameter is None:
        known = ", ".join(module._parameters) or "none"
        raise ConfigError("shard_spec.name", name, f"a parameter of {type(module).__name__} itself ({known})")
    if not -parameter.dim() <= spec.dim < parameter.dim() or parameter.shape[spec.dim] != len(spec.index):
        raise ConfigError(
            "shard_spec.index",
            spec.index,
            f"one logical position per local slice: parameter {name!r} has shape {tuple(parameter.shape)}, "
            f"sharded dim {spec.dim}",
        )
    specs = module.__dict__.setdefault(_SPECS_ATTRIBUTE, {})
    specs[name] = spec


def shard_specs(root: nn.Module) -> dict[str, ShardSpec]:
    """The spec of every marked parameter under ``root``, by each of its fully qualified names.

    A module used in several places has several names, and ``state_dict`` lists its parameters under all of them.
    """
    found: dict[str, ShardSpec] = {}
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, spec in module.__dict__.get(_SPECS_ATTRIBUTE, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = spec
    return found


def sharded_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter, ShardSpec | None]]:
    """Every parameter under ``root`` once, in ``named_parameters`` order, with its spec (None for dense)."""
    specs = shard_specs(root)
    return [(name, parameter, specs.get(name)) for name, parameter in root.named_parameters()]


def state_dict_specs(root: nn.Module) -> dict[str, ShardSpec]:
    """The spec of every sharded entry of ``root.state_dict()``, by its key there.

    Modules may override ``state_dict`` and give parameters other names. Such an entry is recognised by its memory:
    taken for a dense one, it would be saved from a single rank, and the experts of all others would be lost without an
    error.
    """
    named = shard_specs(root)
    of_memory = {
        (parameter.data_ptr(), parameter.shape): spec
        for _, parameter, spec in sharded_parameters(root)
        if spec is not None and parameter.numel()
    }
    found: dict[str, ShardSpec] = {}
    for key, value in root.state_dict().items():
        if isinstance(value, Tensor):
            spec = named.get(key) or of_memory.get((value.data_ptr(), value.shape))
            if spec is not None:
                found[key] = spec
    return found


@torch.no_grad()
def sharded_init_(parameter: Tensor, index: Sequence[int], fill: Callable[[Tensor, torch.Generator], object]) -> None:
    """Initialise the slices of a sharded tensor so that the whole tensor does not depend on the topology.

    Draws exactly one number from torch's default CPU generator, whatever the topology, so that all later draws stay
    the same, and fills the slice of each logical position from a generator of its own.

    Args:
        parameter: Local tensor, sharded along dim 0; filled in place.
        index: Logical position of each local slice.
        fill: Called as ``fill(slice, generator)`` on a contiguous CPU float32 tensor of the slice's shape; fills it.
    """
    assert parameter.shape[0] == len(index)
    seed = int(torch.randint(2**62, (), device="cpu").item())
    for local, logical in enumerate(index):
        generator = torch.Generator().manual_seed(fold_seed(seed, logical))
        values = torch.empty(parameter.shape[1:], dtype=torch.float32, device="cpu")
        fill(values, generator)
        parameter[local].copy_(values)


def replica_axis_of(spec: ShardSpec | None) -> Axis:
    """The axis over which a parameter with this spec is replicated."""
    return (
        Axis.EXPERT_DATA if spec is not None and spec.axis in (Axis.EXPERT, Axis.EXPERT_TENSOR) else Axis.DATA_CONTEXT
    )
