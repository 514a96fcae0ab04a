"""The parallel mesh: one rank's place on every axis, with the process groups that go with it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.parallel.layout import Axis, axis_named, rank_lists


class ParallelMesh:
    """Dense and expert views of the same ranks, seen from one rank.

    Use :meth:`build` inside an initialised ``torch.distributed`` and :meth:`single` in a process that has none. The
    groups are plain :class:`torch.distributed.ProcessGroup` objects, so any third-party layer can use them. Every axis
    has a communicator of its own even when two axes hold the same ranks: a dispatch on ``expert`` must not queue behind
    a gradient reduction on ``data``. Only ``tied`` is that of ``data_context`` where there is no pipeline.

    A mesh is immutable. Copying a module that refers to one keeps referring to the same mesh, and pickling a mesh keeps
    the sizes and drops the groups (a :class:`~torch.distributed.ProcessGroup` cannot be pickled).

    Args:
        config: Resolved axis sizes.
        global_rank: This process' rank in the world.
        groups: This rank's process group of each axis; empty for a mesh without communication.
    """

    def __init__(
        self, config: ParallelConfig, global_rank: int, groups: dict[Axis, dist.ProcessGroup] | None = None
    ) -> None:
        self.config = config
        self.global_rank = global_rank
        self._groups = dict(groups or {})
        # Looked up, not computed, at every call: torch.compile cannot trace the computation.
        self._ranks = {axis: next(ranks for ranks in rank_lists(config, axis) if global_rank in ranks) for axis in Axis}
        self._sizes = {axis: len(ranks) for axis, ranks in self._ranks.items()}
        self._positions = {axis: ranks.index(global_rank) for axis, ranks in self._ranks.items()}

    @classmethod
    def build(cls, config: ParallelConfig, timeout: timedelta | None = None) -> Self:
        """Create every process group, in the order of :class:`Axis`; a collective call.

        All axes of size 1 share one group. Most axes have that size; to create a group takes a call on every rank of
        the world, and a gloo group has three threads.

        Args:
            config: Axis sizes; ``data`` may be left out.
            timeout: Time after which a collective on these groups fails; the backend's default when left out.

        Raises:
            ConfigError: The sizes do not fit the world.
        """
        config = config.resolve(dist.get_world_size())
        global_rank = dist.get_rank()
        world = dist.group.WORLD
        assert world is not None
        groups: dict[Axis, dist.ProcessGroup] = {Axis.WORLD: world}
        alone: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for axis in Axis:
            if axis is Axis.WORLD or (axis is Axis.TIED and config.pipeline == 1):
                continue
            for ranks in rank_lists(config, axis):
                if ranks in alone:
                    group = alone[ranks]
                elif len(ranks) == 1:
                    group = alone[ranks] = dist.new_group(list(ranks), timeout=timeout, group_desc="alone")
                else:
                    group = dist.new_group(list(ranks), timeout=timeout, group_desc=str(axis))
                if global_rank in ranks:
                    groups[axis] = group
        groups.setdefault(Axis.TIED, groups[Axis.DATA_CONTEXT])  # without a pipeline they reduce the same gradients
        return cls(config, global_rank, groups)

    @classmethod
    def single(cls) -> Self:
        """A world of one without ``torch.distributed``: every axis has size 1 and no group."""
        return cls(ParallelConfig(data=1), 0)

    @property
    def world_size(self) -> int:
        """Number of ranks in the world."""
        return self.size(Axis.WORLD)

    def size(self, axis: str) -> int:
        """Number of ranks in this rank's group along ``axis``."""
        return self._sizes[axis_named(axis)]

    def rank(self, axis: str) -> int:
        """This rank's position in its group along ``axis``, from 0."""
        return self._positions[axis_named(axis)]

    def ranks(self, axis: str) -> tuple[int, ...]:
        """Global ranks of this rank's group along ``axis``, ascending."""
        return self._ranks[axis_named(axis)]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """This rank's process group along ``axis``.

        Returns:
            The group, also for an axis of size 1; None only on a mesh without communication (:meth:`single`).
        """
        return self._groups.get(axis_named(axis))

    def active_group(self, axis: str) -> dist.ProcessGroup | None:
        """The group along ``axis`` if there is anybody to communicate with, None on an axis of size 1."""
        if self.size(axis) == 1:
            return None
        group = self.group(axis)
        # A pickled mesh comes back without groups; going on without communication would be wrong without an error.
        assert group is not None, "this mesh has lost its process groups"
        return group

    def __repr__(self) -> str:
        dense = (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT, Axis.TENSOR)
        expert = (Axis.EXPERT_DATA, Axis.EXPERT, Axis.EXPERT_TENSOR)

        def view(axes: tuple[Axis, ...]) -> str:
            return ", ".join(f"{axis}={self.rank(axis)}/{self.size(axis)}" for axis in axes)

        return f"ParallelMesh(rank {self.global_rank}/{self.world_size}; dense {view(dense)}; expert {view(expert)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Callbacks deepcopy whole modules (weight averaging does); a copy of a communicator would be meaningless.
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config, self.global_rank)
