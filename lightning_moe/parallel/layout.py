"""Which global ranks form which group: pure arithmetic on axis sizes, without torch.

The same ranks are seen twice. The *dense* view is the grid ``(pipeline, data, context, tensor)``, the *expert* view is
the grid ``(pipeline, expert_data, expert, expert_tensor)``; both are row-major, so the last axis holds neighbouring
ranks. This is Megatron-core's order ``"tp-cp-ep-dp-pp"`` (it writes the fastest axis first), so a group built here has
the same members in the same order as the group that Megatron-core builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from itertools import product
from math import prod

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError


class Axis(StrEnum):
    """Names of the groups a rank belongs to, in the order in which process groups are created.

    The order is the one in which Megatron-core creates the groups that both have. Creation is a collective call on
    every rank, so all ranks must go through this list in the same order.
    """

    WORLD = "world"
    """All ranks."""
    DATA_CONTEXT = "data_context"
    """Ranks that hold the same dense weights: dense gradients are reduced over it."""
    DATA = "data"
    """Ranks that see different samples."""
    CONTEXT = "context"
    """Ranks that share one sequence."""
    TENSOR = "tensor"
    """Ranks that share one dense weight matrix."""
    PIPELINE = "pipeline"
    """Ranks that hold the successive stages of one copy of the model."""
    DATA_CONTEXT_TENSOR = "data_context_tensor"
    """Ranks of one pipeline stage, which hold all tokens of the global batch between them."""
    CONTEXT_TENSOR = "context_tensor"
    """Ranks that hold the tokens of the same samples between them."""
    EXPERT = "expert"
    """Ranks that the experts of one layer are spread over: tokens are dispatched within it."""
    EXPERT_TENSOR = "expert_tensor"
    """Ranks that share the weight matrices of one expert."""
    EXPERT_MODEL = "expert_model"
    """Ranks that hold one copy of all experts between them (``expert`` and ``expert_tensor``)."""
    EXPERT_DATA = "expert_data"
    """Ranks that hold the same experts: expert gradients are reduced over it."""
    TIED = "tied"
    """Ranks that hold a dense weight which the first and the last pipeline stage have in common: the ``data_context``
    groups of both. Stages between them have none, and their groups are those of ``data_context``."""


_DENSE_VIEW = (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT, Axis.TENSOR)
_EXPERT_VIEW = (Axis.PIPELINE, Axis.EXPERT_DATA, Axis.EXPERT, Axis.EXPERT_TENSOR)
_FOLDED: Mapping[Axis, tuple[Axis, ...]] = {
    Axis.WORLD: _DENSE_VIEW,
    Axis.DATA_CONTEXT: (Axis.DATA, Axis.CONTEXT),
    Axis.CONTEXT_TENSOR: (Axis.CONTEXT, Axis.TENSOR),
    Axis.DATA_CONTEXT_TENSOR: (Axis.DATA, Axis.CONTEXT, Axis.TENSOR),
    Axis.EXPERT_MODEL: (Axis.EXPERT, Axis.EXPERT_TENSOR),
}


def axis_named(name: str) -> Axis:
    """Return the :class:`Axis` called ``name``.

    Raises:
        ConfigError: There is no such axis.
    """
    try:
        return Axis(name)
    except ValueError:
        raise ConfigError("axis", name, "one of " + ", ".join(Axis)) from None


def axis_size(config: ParallelConfig, axis: Axis) -> int:
    """Number of ranks in each group along ``axis``, which is any but ``tied``; ``config`` must be resolved."""
    sizes, members = _view(config, axis)
    return prod(sizes[member] for member in members)


def rank_lists(config: ParallelConfig, axis: Axis) -> list[tuple[int, ...]]:
    """All groups along ``axis``, each a tuple of global ranks in ascending order.

    Args:
        config: Resolved sizes (see :meth:`ParallelConfig.resolve`).
        axis: The axis, or folded axes (``data_context``), or the whole world.

    Returns:
        Tuples that partition the ranks ``0 .. world_size - 1``, in the row-major order of their coordinates on the
        other axes. All have ``axis_size`` members, except those of ``tied``.
    """
    if axis is Axis.TIED:
        return _tied(rank_lists(config, Axis.DATA_CONTEXT), config)
    sizes, members = _view(config, axis)
    strides = _strides(sizes)
    others = [name for name in sizes if name not in members]
    return [
        tuple(outer + inner for inner in _offsets(members, sizes, strides))
        for outer in _offsets(others, sizes, strides)
    ]


def coordinate(config: ParallelConfig, axis: Axis, global_rank: int) -> int:
    """Position of ``global_rank`` within its group along ``axis``, which is any but ``tied``."""
    sizes, members = _view(config, axis)
    strides = _strides(sizes)
    position = 0
    for member in members:
        position = position * sizes[member] + global_rank // strides[member] % sizes[member]
    return position


def _tied(replicas: list[tuple[int, ...]], config: ParallelConfig) -> list[tuple[int, ...]]:
    """Join the groups of the first pipeline stage to those of the last; each stage has one for every tensor rank."""
    if config.pipeline == 1:
        return replicas
    first, last = replicas[: config.tensor], replicas[-config.tensor :]
    return [one + other for one, other in zip(first, last, strict=True)] + replicas[config.tensor : -config.tensor]


def _view(config: ParallelConfig, axis: Axis) -> tuple[dict[Axis, int], tuple[Axis, ...]]:
    """Sizes of the view that ``axis`` lives in, outermost first, and the axes of the view that ``axis`` folds."""
    assert config.data is not None, "resolve(world_size) first"
    assert axis is not Axis.TIED, "the groups of this axis differ in size"
    members = _FOLDED.get(axis, (axis,))
    if set(members) <= set(_DENSE_VIEW):
        return dict(
            zip(_DENSE_VIEW, (config.pipeline, config.data, config.context, config.tensor), strict=True)
        ), members
    shape = (config.pipeline, config.expert_data, config.expert, config.expert_tensor)
    return dict(zip(_EXPERT_VIEW, shape, strict=True)), members


def _strides(sizes: dict[Axis, int]) -> dict[Axis, int]:
    shape = list(sizes.values())
    return {axis: prod(shape[i + 1 :]) for i, axis in enumerate(sizes)}


def _offsets(axes: tuple[Axis, ...] | list[Axis], sizes: dict[Axis, int], strides: dict[Axis, int]) -> list[int]:
    """Rank offsets of every coordinate along ``axes``, the last axis fastest."""
    grid = product(*(range(sizes[axis]) for axis in axes))
    return [sum(i * strides[axis] for i, axis in zip(point, axes, strict=True)) for point in grid]
