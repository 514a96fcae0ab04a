"""Marking parameters that are sharded over axes, and initialising them independently of the topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, axis_named
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.rng import fold_seed

# [Note: where shard specs live]
# A spec belongs to (module, parameter name), not to the parameter object: deepcopy, pickling and weight averaging build
# new Parameter objects without their attributes, and a spec that got lost would let an expert's gradient be reduced
# over the wrong ranks without any error.
_SPECS_ATTRIBUTE = "_shard_specs"
_PARTIAL_ATTRIBUTE = "_partial_grads"
_TIED_ATTRIBUTE = "_tied_parameters"

# [Note: partial gradients]
# A parameter that every tensor rank holds whole is used in one of two ways. Either all tensor ranks compute the same
# with it (a norm on activations that are copies): then each has the whole gradient. Or each applies it to its own
# tokens or heads (a norm under sequence parallelism, a router, a per-head query norm): then each has a part, and the
# gradient is the sum. Only the module knows which; it marks the second kind.

# [Note: tied parameters]
# A model whose embedding serves as the output projection uses one weight in its first and in its last pipeline stage.
# Where these are on different ranks, both stages hold it, under one name. Each has the gradient of its own use; the sum
# over both is the gradient, so that the copies take equal steps. The module that holds the weight marks it.


@dataclass(frozen=True)
class ShardSpec:
    """How one dim of this rank's parameter relates to the whole ("logical") tensor.

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


ShardSpecs = tuple[ShardSpec, ...]
"""The specs of one parameter, one for each sharded dim; empty for a parameter that every rank holds whole."""


def set_shard_spec(module: nn.Module, name: str, *specs: ShardSpec) -> None:
    """Mark ``module``'s own parameter ``name`` as sharded, along one dim for each spec.

    A marked parameter's gradient is reduced over its replicas only (``expert_data`` for the axis ``expert``), counted
    once in the gradient norm, and saved and loaded by logical position. Unmarked parameters are dense.

    Raises:
        ConfigError: There is no such parameter, its length along a spec's dim is not that of the spec's index, or two
            specs name the same dim.
    """
    parameter = _own_parameter(module, name)
    for spec in specs:
        if not -parameter.dim() <= spec.dim < parameter.dim() or parameter.shape[spec.dim] != len(spec.index):
            raise ConfigError(
                "shard_spec.index",
                spec.index,
                f"one logical position per local slice: parameter {name!r} has shape {tuple(parameter.shape)}, "
                f"sharded dim {spec.dim}",
            )
    dims = [spec.dim % parameter.dim() for spec in specs]
    if len(set(dims)) != len(dims):
        raise ConfigError("shard_spec.dim", dims, "each dim at most once")
    module.__dict__.setdefault(_SPECS_ATTRIBUTE, {})[name] = specs


def set_partial_grad(module: nn.Module, name: str) -> None:
    """Mark ``module``'s own unsharded parameter ``name`` as one of which each tensor rank has a part of the gradient.

    Raises:
        ConfigError: There is no such parameter.
    """
    _own_parameter(module, name)
    module.__dict__.setdefault(_PARTIAL_ATTRIBUTE, set()).add(name)


def set_tied(module: nn.Module, name: str) -> None:
    """Mark ``module``'s own parameter ``name`` as one that the first and the last pipeline stage both hold.

    It has the same name on both, and is dense or split over ``tensor``. Its gradient is summed over both stages, its
    first value is that of the first stage, and checkpoints hold it once.

    Raises:
        ConfigError: There is no such parameter.
    """
    _own_parameter(module, name)
    module.__dict__.setdefault(_TIED_ATTRIBUTE, set()).add(name)


def shard_specs(root: nn.Module) -> dict[str, ShardSpecs]:
    """The specs of every marked parameter under ``root``, by each of its fully qualified names.

    A module used in several places has several names, and ``state_dict`` lists its parameters under all of them.
    """
    found: dict[str, ShardSpecs] = {}
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, specs in module.__dict__.get(_SPECS_ATTRIBUTE, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = specs
    return found


def partial_grads(root: nn.Module) -> set[nn.Parameter]:
    """The parameters under ``root`` whose gradients are partial on each tensor rank (see :func:`set_partial_grad`)."""
    return _marked(root, _PARTIAL_ATTRIBUTE)


def tied_parameters(root: nn.Module) -> set[nn.Parameter]:
    """The parameters under ``root`` that the first and the last pipeline stage both hold (see :func:`set_tied`)."""
    return _marked(root, _TIED_ATTRIBUTE)


def _marked(root: nn.Module, attribute: str) -> set[nn.Parameter]:
    return {
        module._parameters[name]  # type: ignore[misc]  # marked parameters exist
        for module in root.modules()
        for name in module.__dict__.get(attribute, ())
    }


def sharded_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter, ShardSpecs]]:
    """Every parameter under ``root`` once, in ``named_parameters`` order, with its specs (empty for dense)."""
    # By object: of a parameter that several modules share, the one that named_parameters names may have no mark.
    specs = {
        module._parameters[name]: marked
        for module in root.modules()
        for name, marked in module.__dict__.get(_SPECS_ATTRIBUTE, {}).items()
        if name in module._parameters
    }
    return [(name, parameter, specs.get(parameter, ())) for name, parameter in root.named_parameters()]


def state_dict_specs(root: nn.Module) -> dict[str, ShardSpecs]:
    """The specs of every sharded entry of ``root.state_dict()``, by its key there.

    Modules may override ``state_dict`` and give parameters other names. Such an entry is recognised by its memory:
    taken for a dense one, it would be saved from a single rank, and the experts of all others would be lost without an
    error.
    """
    named = shard_specs(root)
    of_memory = {
        (parameter.data_ptr(), parameter.shape): specs
        for _, parameter, specs in sharded_parameters(root)
        if specs and parameter.numel()
    }
    found: dict[str, ShardSpecs] = {}
    for key, value in root.state_dict().items():
        if isinstance(value, Tensor):
            specs = named.get(key) or of_memory.get((value.data_ptr(), value.shape))
            if specs:
                found[key] = specs
    return found


def whole_shape(local: Tensor, specs: ShardSpecs) -> tuple[int, ...]:
    """Shape of the whole tensor that ``local`` is a part of."""
    shape = list(local.shape)
    for spec in specs:
        shape[spec.dim] = spec.size
    return tuple(shape)


def local_part(whole: Tensor, specs: ShardSpecs) -> Tensor:
    """The positions of a whole tensor that a rank with ``specs`` holds; dims of another length are left as they are."""
    for spec in specs:
        if whole.dim() > spec.dim and whole.shape[spec.dim] == spec.size and not _is_identity(spec):
            index = torch.tensor(spec.index, dtype=torch.int64, device=whole.device)
            whole = whole.index_select(spec.dim, index)
    return whole


def even_slice(size: int, mesh: ParallelMesh, axis: str) -> range:
    """This rank's run of ``size`` positions along ``axis``, in rank order; the first ranks hold one more if uneven."""
    ranks, rank = mesh.size(axis), mesh.rank(axis)
    base, more = divmod(size, ranks)
    start = rank * base + min(rank, more)
    return range(start, start + base + (rank < more))


@torch.no_grad()
def sharded_init_(parameter: Tensor, specs: ShardSpecs, fill: Callable[[Tensor, torch.Generator], object]) -> None:
    """Initialise a parameter so that the whole tensor does not depend on the topology.

    Draws exactly one number from torch's default CPU generator, whatever the topology, so that all later draws stay
    the same. Along an ``expert`` spec of dim 0, each logical position is filled from a generator of its own, so a rank
    draws the numbers of its own experts only. Along other dims the whole length is drawn and this rank's part kept.

    Args:
        parameter: Local tensor; filled in place. For one on the device ``meta`` the number is drawn, and that is all.
        specs: Its specs; empty for a tensor that is not sharded.
        fill: Called as ``fill(values, generator)`` on contiguous CPU float32 tensors; fills them.
    """
    seed = int(torch.randint(2**62, (), device="cpu").item())
    if parameter.is_meta:
        return
    rows = next((spec for spec in specs if spec.axis == Axis.EXPERT and spec.dim == 0), None)
    if rows is None:
        values = torch.empty(whole_shape(parameter, specs), dtype=torch.float32, device="cpu")
        fill(values, torch.Generator().manual_seed(seed))
        parameter.copy_(local_part(values, specs))
        return
    # One slice at a time: a dim of the parameter is one lower in its slices.
    rest = tuple(
        ShardSpec(spec.axis, spec.dim % parameter.dim() - 1, spec.size, spec.index)
        for spec in specs
        if spec is not rows
    )
    shape = whole_shape(parameter, specs)[1:]
    for local, logical in enumerate(rows.index):
        generator = torch.Generator().manual_seed(fold_seed(seed, logical))
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        fill(values, generator)
        parameter[local].copy_(local_part(values, rest))


@torch.no_grad()
def whole_init_(parameter: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Initialise a parameter that every rank holds whole, from torch's default CPU generator on any device.

    Args:
        parameter: Filled in place; for one on the device ``meta`` the same numbers are drawn.
        fill: Fills a CPU tensor of the parameter's shape and dtype.
    """
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    fill(values)
    parameter.copy_(values)


def replica_axis_of(specs: ShardSpecs, *, partial_grad: bool = False, tied: bool = False) -> Axis:
    """The axis over which the gradient of a parameter with these specs is summed.

    Args:
        specs: The parameter's specs.
        partial_grad: Whether each tensor rank has a part of the gradient (see :func:`set_partial_grad`).
        tied: Whether the first and the last pipeline stage both hold the parameter (see :func:`set_tied`).

    Raises:
        ConfigError: A tied parameter is split over expert axes, or its gradient over ``tensor``.
    """
    axis = Axis.DATA_CONTEXT_TENSOR if partial_grad and not specs else Axis.DATA_CONTEXT
    if any(spec.axis in (Axis.EXPERT, Axis.EXPERT_TENSOR) for spec in specs):
        axis = Axis.EXPERT_DATA
    if tied and axis is not Axis.DATA_CONTEXT:
        raise ConfigError(
            "set_tied", f"a parameter whose gradient is summed over {axis}", "one that is dense or split over tensor"
        )
    return Axis.TIED if tied else axis


def shard_axis_of(specs: ShardSpecs) -> Axis | None:
    """The axis along which a parameter with these specs is spread; None when every rank of a stage holds it whole."""
    axes = {axis_named(spec.axis) for spec in specs}
    if axes == {Axis.EXPERT, Axis.EXPERT_TENSOR}:
        return Axis.EXPERT_MODEL
    assert len(axes) <= 1, f"no axis spreads a parameter over {sorted(axes)}"
    return next(iter(axes), None)


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters.get(name)
    if parameter is None:
        known = ", ".join(module._parameters) or "none"
        raise ConfigError("shard_spec.name", name, f"a parameter of {type(module).__name__} itself ({known})")
    return parameter


def _is_identity(spec: ShardSpec) -> bool:
    return spec.is_whole and all(i == position for position, i in enumerate(spec.index))
