"""Sharded tensors at the border to ``torch.distributed.checkpoint`` (DCP)."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_moe.parallel.sharding import ShardSpec, ShardSpecs, whole_shape


class LogicalShard(Tensor):
    """A rank's part of a whole tensor, as DCP sees it: chunks at their logical offsets.

    DCP lets a tensor describe its own chunks through three methods (DTensor uses them too). A DTensor can only describe
    contiguous blocks in rank order; experts may be placed in any order, and a rank's rows of a fused projection are
    several runs. So each run of consecutive logical positions becomes one chunk (with several sharded dims, each
    combination of runs). Files therefore hold whole tensors in logical order, and any topology can read its own
    positions. Replicas on other ranks describe the same chunks, and DCP writes each chunk once.
    """

    specs: ShardSpecs

    @classmethod
    def wrap(cls, local: Tensor, specs: ShardSpecs) -> Self:
        """Wrap a local tensor without copying it."""
        shard = torch.Tensor._make_subclass(cls, local.detach())
        shard.specs = specs
        return shard

    @property
    def local(self) -> Tensor:
        """The local tensor itself."""
        return self.as_subclass(torch.Tensor)

    def size(self, dim: int | None = None) -> Any:
        """Size of the whole tensor, which DCP compares with the file's; ``shape`` stays the local one."""
        whole = torch.Size(whole_shape(self.local, self.specs))
        return whole if dim is None else whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Offsets and sizes of the chunks in the whole tensor."""
        chunks = []
        for runs in product(*map(_runs, self.specs)):
            offsets, sizes = [0] * self.dim(), list(self.shape)
            for spec, (start, stop) in zip(self.specs, runs, strict=True):
                offsets[spec.dim], sizes[spec.dim] = spec.index[start], stop - start
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        return chunks

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """One write per chunk, each naming the whole tensor's size."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The local slice that holds the chunk at ``index.offset``."""
        assert index.offset is not None
        shard = self.local
        for spec in self.specs:
            start, stop = next(run for run in _runs(spec) if spec.index[run[0]] == index.offset[spec.dim])
            shard = shard.narrow(spec.dim, start, stop - start)
        return shard


def to_logical(local: Tensor, specs: ShardSpecs) -> Tensor:
    """Wrap a tensor that is sharded; others pass unchanged."""
    return LogicalShard.wrap(local, specs) if specs else local


def _runs(spec: ShardSpec) -> list[tuple[int, int]]:
    """Local ``(start, stop)`` of each run of consecutive logical positions."""
    index = spec.index
    cuts = [i for i in range(1, len(index)) if index[i] != index[i - 1] + 1]
    return list(pairwise([0, *cuts, len(index)])) if index else []
