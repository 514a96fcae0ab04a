"""Sharded tensors at the border to ``torch.distributed.checkpoint`` (DCP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_moe.checkpoint.boxes import boxes
from lightning_moe.parallel.sharding import ShardSpec, ShardSpecs


@dataclass(frozen=True)
class FlatRun:
    """Which elements of a rank's tensor a tensor of one dim holds.

    Attributes:
        shape: Shape of the rank's tensor.
        order: Its dims in the order of memory, the slowest first: not ``0, 1, ...`` for ``channels_last`` and
            transposed tensors.
        run: Positions of the elements in the order of memory.
        writes: Whether this rank writes them to files.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    run: range
    writes: bool = True

    @classmethod
    def of(cls, tensor: Tensor, run: range, *, writes: bool = True) -> Self:
        """The run of ``tensor``'s elements; memory that has gaps counts as if it had none."""
        strides = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        return cls(tuple(tensor.shape), tuple(order), run, writes)

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of the run's elements of a tensor of :attr:`shape`."""
        assert tuple(tensor.shape) == self.shape, f"{tuple(tensor.shape)} is not {self.shape}"
        return tensor.permute(self.order).reshape(-1)[self.run.start : self.run.stop].clone()

    def blocks(self, flat: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """The rectangular blocks of the rank's tensor that the run consists of.

        Args:
            flat: The run's elements, ``[len(run)]``.

        Yields:
            A block's offset along each dim, and the block as a view of ``flat``, with the dims of the rank's tensor.
        """
        place = [self.order.index(dim) for dim in range(len(self.order))]
        begin = 0
        for offsets, sizes in boxes([self.shape[dim] for dim in self.order], self.run):
            block = flat[begin : begin + prod(sizes)].view(sizes)
            begin += block.numel()
            yield [offsets[i] for i in place], block.permute(place)


class LogicalShard(Tensor):
    """A rank's part of a whole tensor, as DCP sees it: chunks at their logical offsets.

    DCP lets a tensor describe its own chunks through three methods (DTensor uses them too). A DTensor can only describe
    contiguous blocks in rank order; experts may be placed in any order, and a rank's rows of a fused projection are
    several runs. So each run of consecutive logical positions becomes one chunk (with several sharded dims, each
    combination of runs). Files therefore hold whole tensors in logical order, and any topology can read its own
    positions. Replicas on other ranks describe the same chunks, and DCP writes each chunk once.

    What a sharded optimizer holds is a run of the elements of the rank's tensor (:class:`FlatRun`): a few rectangular
    blocks, each of which is cut into chunks in the same way.
    """

    specs: ShardSpecs
    flat: FlatRun | None
    _shards: dict[torch.Size, Tensor] | None

    @classmethod
    def wrap(cls, local: Tensor, specs: ShardSpecs, flat: FlatRun | None = None) -> Self:
        """Wrap a local tensor without copying it.

        Args:
            local: What this rank holds, ``[len(flat.run)]`` for a flat run.
            specs: How the dims of the rank's tensor relate to the whole one.
            flat: Which elements of the rank's tensor ``local`` holds; None for all, in their own shape.
        """
        assert flat is None or local.shape == (len(flat.run),), f"{tuple(local.shape)} is no run of {flat}"
        shard = torch.Tensor._make_subclass(cls, local.detach())
        shard.specs, shard.flat, shard._shards = specs, flat, None
        return shard

    def with_local(self, local: Tensor) -> Self:
        """The same part of the same whole tensor in other memory, e.g. in a host copy."""
        assert local.shape == self.shape, f"{tuple(local.shape)} is not {tuple(self.shape)}"
        return self.wrap(local, self.specs, self.flat)

    @property
    def local(self) -> Tensor:
        """The local tensor itself."""
        return self.as_subclass(torch.Tensor)

    def size(self, dim: int | None = None) -> Any:
        """Size of the whole tensor, which DCP compares with the file's; ``shape`` stays the local one."""
        sizes = list(self.shape if self.flat is None else self.flat.shape)
        for spec in self.specs:
            sizes[spec.dim] = spec.size
        return torch.Size(sizes) if dim is None else sizes[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Offsets and sizes of the chunks in the whole tensor; none if this rank holds no elements."""
        return [ChunkStorageMetadata(offsets, shard.shape) for offsets, shard in self._shard_at().items()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """One write per chunk, each naming the whole tensor's size."""
        if self.flat is not None and not self.flat.writes:
            return []
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
        """The view of the local tensor that holds the chunk at ``index.offset``."""
        assert index.offset is not None
        return self._shard_at()[index.offset]

    def _shard_at(self) -> dict[torch.Size, Tensor]:
        """The view for each chunk, by the chunk's offset; kept, because DCP asks for one at a time."""
        if self._shards is None:
            self._shards = {
                torch.Size(offsets): shard
                for block_offsets, block in self._blocks()
                for offsets, shard in _cut(block, block_offsets, self.specs)
            }
        return self._shards

    def _blocks(self) -> Iterator[tuple[list[int], Tensor]]:
        local = self.local
        if self.flat is None:
            yield [0] * local.dim(), local
        elif 0 in self.size():
            # DCP knows a tensor by its chunks: without one, a tensor that has no elements would be missing in the file.
            yield [0] * len(self.size()), local.view(self.flat.shape)
        else:
            yield from self.flat.blocks(local)


def to_logical(local: Tensor, specs: ShardSpecs) -> Tensor:
    """Wrap a tensor that is sharded; others pass unchanged."""
    return LogicalShard.wrap(local, specs) if specs else local


def _cut(block: Tensor, offsets: Sequence[int], specs: ShardSpecs) -> Iterator[tuple[list[int], Tensor]]:
    """Cut a block of a rank's tensor into views with consecutive logical positions along every dim.

    Args:
        block: The block.
        offsets: Where it begins in the rank's tensor.
        specs: How the dims of the rank's tensor relate to the whole one.

    Yields:
        Where a view begins in the whole tensor, and the view.
    """
    for runs in product(*(_runs(spec, offsets[spec.dim], block.shape[spec.dim]) for spec in specs)):
        logical, view = list(offsets), block
        for spec, (start, stop) in zip(specs, runs, strict=True):
            logical[spec.dim] = spec.index[start]
            view = view.narrow(spec.dim, start - offsets[spec.dim], stop - start)
        yield logical, view


def _runs(spec: ShardSpec, start: int, length: int) -> list[tuple[int, int]]:
    """Local ``(start, stop)`` of each run of consecutive logical positions among ``length`` local ones."""
    index, stop = spec.index, start + length
    cuts = [i for i in range(start + 1, stop) if index[i] != index[i - 1] + 1]
    return list(pairwise([start, *cuts, stop])) if length else []
