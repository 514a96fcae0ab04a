"""Starting ranks, finding their place on the mesh, and the collectives that Lightning itself asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis, axis_size, coordinate
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.strategy.launcher import ShardedMultiProcessingLauncher
from lightning_moe.strategy.meeting import meet

StartMethod = Literal["popen", "spawn", "fork"]

_PATIENCE = timedelta(seconds=10)
"""How long a rank that has had an exception waits for the others to have one as well."""


class MeshStrategy(ParallelStrategy):
    """A Lightning strategy whose ranks form a :class:`ParallelMesh`; it knows nothing of models.

    Args:
        parallel: Sizes of the parallel axes.
        start_method: How to start ranks that no external launcher (torchrun, SLURM) has started.
        process_group_backend: Backend of the process groups; None for the one that suits the device.
        timeout_seconds: Seconds after which a collective gives up.
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: Set by the Trainer.
        checkpoint_io: As in Lightning.
        precision_plugin: Set by the Trainer.
    """

    is_distributed = True  # without it Lightning injects no distributed sampler and ignores sync_dist

    def __init__(
        self,
        parallel: ParallelConfig,
        start_method: StartMethod,
        process_group_backend: str | None,
        timeout_seconds: float,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        if start_method not in ("popen", "spawn", "fork"):
            raise ConfigError("start_method", start_method, "popen, spawn or fork", "notebooks need fork")
        if timeout_seconds <= 0:
            raise ConfigError("timeout_seconds", timeout_seconds, "a positive number of seconds")
        self.parallel = parallel
        self.num_nodes = 1
        self._start_method = start_method
        self._process_group_backend = process_group_backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self._mesh: ParallelMesh | None = None
        self._together: bool | None = None
        self._setups = 0

    @property
    def mesh(self) -> ParallelMesh:
        """This rank's place on every axis, with process groups; exists from ``setup_environment`` on.

        Raises:
            RuntimeError: The processes have not been set up yet.
        """
        if self._mesh is None:
            raise RuntimeError(
                "the mesh exists once the Trainer has started its processes: use it in configure_model or later"
            )
        return self._mesh

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let the mesh be that of a single process, for the main process of spawn, which is none of the ranks."""
        self._mesh = ParallelMesh.single()
        try:
            yield
        finally:
            self._mesh = None

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Number of ranks on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str | None:
        """Backend of the process groups, once known."""
        return self._process_group_backend

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Lightning and users ask for this before any process group exists, so it is pure arithmetic.
        config = self.parallel.resolve(self.num_nodes * self.num_processes)
        return {
            "num_replicas": axis_size(config, Axis.DATA),
            "rank": coordinate(config, Axis.DATA, self.global_rank),
        }

    def set_world_ranks(self) -> None:
        """Tell the cluster environment this process' rank; Lightning calls it before launching too."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for rank_zero in (rank_zero_only, utils_rank_zero_only):
            rank_zero.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self.parallel.resolve(self.num_nodes * self.num_processes)  # refuse bad sizes before any process starts
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ShardedMultiProcessingLauncher(self, start_method=self._start_method)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        if self._process_group_backend is None:
            self._process_group_backend = _get_default_process_group_backend_for_device(self.root_device)
        assert self.cluster_environment is not None
        device_id = self.root_device if self.root_device.type != "cpu" else None
        _init_dist_connection(
            self.cluster_environment, self._process_group_backend, timeout=self._timeout, device_id=device_id
        )
        if self._mesh is None or self._mesh.group(Axis.WORLD) is not dist.group.WORLD:
            self._mesh = ParallelMesh.build(self.parallel, self._timeout)
        self._together = None
        self._setups += 1

    def ranks_are_together(self) -> bool:
        """Whether collective calls find their partners.

        After an exception only if every rank has stopped at the same step. What Lightning and its callbacks do then
        (save a checkpoint, ask whether a file exists) is collective, and would hang for the rank that is alone.
        """
        trainer = None if self.lightning_module is None else self.lightning_module._trainer
        if trainer is None or trainer.state.status != TrainerStatus.INTERRUPTED:
            return True
        if self._together is None:
            world_size = dist.get_world_size() if _distributed_is_initialized() else 1
            place = f"{self._setups}/{trainer.state.fn}/{trainer.global_step}"
            self._together = world_size == 1 or meet(place, dist.get_rank(), world_size, _PATIENCE)
        return self._together

    @override
    def barrier(self, name: str | None = None) -> None:
        if not _distributed_is_initialized() or not self.ranks_are_together():
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized() or not self.ranks_are_together():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if isinstance(tensor, Tensor) and self.ranks_are_together():
            averages = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
            if averages and not (tensor.is_floating_point() or tensor.is_complex()):
                # Lightning divides in place and so drops the fraction; it averages its integer sample counts, which
                # makes every logged mean wrong as soon as ranks have different numbers of samples.
                tensor = tensor.double()
            return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # Process groups cannot be pickled, and a spawned rank builds its own.
        return {**super().__getstate__(), "_mesh": None}
