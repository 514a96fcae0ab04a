"""Lightning's throughput monitor, where not every rank has samples of its own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch import callbacks
from typing_extensions import override

from lightning_moe.parallel.layout import Axis


class ShardedThroughputMonitor(callbacks.ThroughputMonitor):
    """``ThroughputMonitor`` that counts every sample once.

    Lightning multiplies what it sees on rank 0 by the number of ranks. Ranks of the axes pipeline, context and tensor
    work on the same samples, so that only those of ``data`` count. As in Lightning, ``device/...`` is the total divided
    by the number of ranks, and ``flops_per_batch`` of the module is the work of the whole model on one batch.

    :class:`~lightning_moe.MoEStrategy` puts it in the place of Lightning's own, with the same arguments.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data_ranks = trainer.strategy.mesh.size(Axis.DATA)  # type: ignore[attr-defined]
        for key, throughput in self._throughputs.items():
            if not isinstance(throughput, ShardedThroughput):
                self._throughputs[key] = ShardedThroughput(
                    data_ranks, trainer.world_size, available_flops=self.available_flops, **self.kwargs
                )


class ShardedThroughput(Throughput):
    """Lightning's throughput, of ranks of which some work on the same samples.

    Args:
        data_ranks: Number of ranks that see different samples.
        ranks: Number of all ranks.
        **kwargs: Arguments of :class:`~lightning.fabric.utilities.throughput.Throughput`, without ``world_size``.
    """

    def __init__(self, data_ranks: int, ranks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_ranks = data_ranks
        self.ranks = ranks

    @override
    def compute(self) -> dict[str, int | float]:
        """The metrics of Lightning's class, which are here those of one batch, for all ranks."""
        metrics = super().compute()
        prefix, usage = f"device{self.separator}", f"device{self.separator}mfu"
        for name, value in list(metrics.items()):
            if name.startswith(prefix):
                total = value * self.data_ranks
                metrics[name] = total / self.ranks
                if name != usage:
                    metrics[name.removeprefix(prefix)] = total
        return metrics
