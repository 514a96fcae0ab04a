"""The weights of one bucket: how steps get into them, and how main weights follow what others write.

The weights of a sharded bucket lie in one flat buffer, laid out like its gradients. Float32 main parameters are views
of the own shard in it. After the step the shards are gathered in place, and every rank has whole weights again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.buckets import Bucket, own_shard
from lightning_moe.parallel.collectives import start_all_gather_
from lightning_moe.parallel.slots import Slot


@dataclass(eq=False)
class BucketWeights:
    """The weights of one bucket whose optimizer is sharded, or whose parameters are of low precision."""

    bucket: Bucket
    flat: Tensor | None = None
    """Weights of all parameters, laid out like the bucket's gradients; None if the bucket is not sharded."""
    shard: Tensor | None = None
    """Main weights of this rank's shard, where they are not views of ``flat``."""
    gather: dist.Work | None = None
    versions: list[int] = field(default_factory=list)
    """Of the parameters, when main weights were last brought in line with them."""

    def flatten(self) -> None:
        """Move the parameters of a sharded bucket into one buffer."""
        dtype = self.bucket.slots[0].parameter.dtype
        self.flat = torch.zeros(self.bucket.layout.total, dtype=dtype, device=self.bucket.grads.device)
        for slot in self.bucket.slots:
            self._move_in(slot)
        if dtype != self.bucket.grads.dtype:
            self.shard = self.own.to(self.bucket.grads.dtype)

    @property
    def own(self) -> Tensor:
        """This rank's shard of the weights."""
        assert self.flat is not None
        return own_shard(self.flat, self.bucket.layout, self.bucket.rank)

    def take_step(self, slots: Sequence[Slot]) -> None:
        """Bring what an optimizer has stepped into the weights; those of other ranks are waited for later.

        Args:
            slots: Those whose main parameters it holds.
        """
        if self.flat is None:
            torch._foreach_copy_([s.parameter for s in slots], [s.main for s in slots if s.main is not None])
            self.versions = self.read_versions()
            return
        if self.shard is not None:
            self.own.copy_(self.shard)
        assert self.bucket.group is not None
        self.gather = start_all_gather_(self.flat, self.bucket.group).work

    def wait(self) -> None:
        """Wait until the weights are those of all ranks."""
        if self.gather is not None:
            self.gather.wait()
            self.gather = None

    def read_versions(self) -> list[int]:
        """How often each parameter has been written; torch does not count what is written through ``.data``."""
        return [slot.parameter._version for slot in self.bucket.slots]

    def follow_moved(self) -> bool:
        """Take back parameters whose ``data`` somebody has replaced by another tensor; return whether there were any.

        Raises:
            ConfigError: It has another dtype.
        """
        if self.flat is None:
            return False
        first, size = self.flat.data_ptr(), self.flat.element_size()
        moved = [
            slot
            for slot in self.bucket.slots
            if slot.parameter.numel() and slot.parameter.data_ptr() != first + size * slot.view.storage_offset()
        ]
        for slot in moved:
            if slot.parameter.dtype != self.flat.dtype:
                _refuse_new_dtype(slot, self.flat.dtype)
            self.wait()
            self._move_in(slot)
        return bool(moved)

    def follow_values(self) -> None:
        """Bring main weights in line with the weights."""
        if self.shard is not None:
            _follow(self.shard, self.own)
        elif self.flat is None:
            for slot in self.bucket.slots:
                if slot.main is not None:
                    _follow(slot.main, slot.parameter)
        self.versions = self.read_versions()

    def _move_in(self, slot: Slot) -> None:
        assert self.flat is not None
        view = self.flat.as_strided(slot.view.shape, slot.view.stride(), slot.view.storage_offset())
        view.copy_(slot.parameter)
        slot.parameter.data = view


def _follow(main: Tensor, weight: Tensor) -> None:
    main.copy_(torch.where(main.to(weight.dtype) == weight, main, weight.to(main.dtype)))


def _refuse_new_dtype(slot: Slot, dtype: torch.dtype) -> None:
    raise ConfigError(
        f"parameter {slot.name}",
        slot.parameter.dtype,
        str(dtype),
        "an optimizer steps a shard of it already: set Trainer(precision=...), or change dtypes in configure_model",
    )
