"""Flat buffers that gradients of many parameters share, and what is known of each parameter in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.parallel.flat import FlatLayout


@dataclass(eq=False)
class Slot:
    """One parameter's place in its bucket."""

    name: str
    parameter: nn.Parameter
    view: Tensor
    """The main gradient, in the parameter's shape and strides."""
    run: range
    """Which of the parameter's elements, in the order of memory, lie in this rank's shard of the bucket."""
    copies: int
    """How many ranks of the pipeline stage have an equal element in their shards, this one included."""
    node: torch.autograd.graph.Node
    """Autograd's node that accumulates the gradient; its hooks live as long as it is referred to."""
    fresh: bool = True
    """Whether the next contribution replaces what the bucket holds."""
    used: bool = False
    """Whether this rank has contributed since accumulation started."""
    arrived: bool = False
    """Whether everything has arrived that the backward passes of this step bring."""
    deferred: bool = False
    """Whether a queue holds gradients that are not in the bucket yet."""
    sunk: bool = False
    """Whether this pipeline step has brought gradients past autograd."""
    apart: Tensor | None = None
    """The sum of what autograd has brought beside them, float32 at least."""
    chunks: frozenset[int] = frozenset()
    """Chunks of a pipeline whose backward passes reached the parameter in the step before."""
    reached: set[int] = field(default_factory=set)
    """Those that have reached it in this step."""
    ended: set[int] = field(default_factory=set)
    """Those whose last backward pass of this step has reached it."""
    copy: Tensor | None = None
    """The low-precision gradient that was handed out, with its version at that time."""
    copy_version: int = 0
    main: nn.Parameter | None = None
    """What the optimizer steps in place of the parameter, if it is another tensor."""
    main_grad: Tensor | None = None
    """The reduced gradient in the shape of ``main``: a view of the bucket."""
    elsewhere: tuple[Tensor, Tensor] | None = None
    """What stands in for the gradient of the parameter, and of ``main``, while the other one has it."""

    @property
    def hidden(self) -> bool:
        """Whether the gradient is too precise for ``parameter.grad``, and the optimizer gets it by ``main``."""
        return self.main is not None and self.parameter.dtype != self.view.dtype


@dataclass(eq=False)
class Bucket:
    """Gradients in one buffer, with the group it is reduced over."""

    layout: FlatLayout
    grads: Tensor
    """The gradients of all parameters, with gaps that stay zero."""
    flags: Tensor
    """For each parameter whether, or how many, ranks have used it. The last part of ``grads`` unless sharded."""
    slots: list[Slot]
    group: dist.ProcessGroup | None
    rank: int
    """This rank's position in the group."""
    scale: float
    """What the sum over the group is multiplied by to give the mean over ``data_context``."""
    sharded: bool
    """Whether each rank of the group gets, and steps, only its shard."""
    missing: int = 0
    issued: bool = False
    reduced: bool = False
    works: list[dist.Work] = field(default_factory=list)

    @property
    def shard(self) -> Tensor:
        """This rank's part of the gradients."""
        return own_shard(self.grads, self.layout, self.rank)

    def wait(self) -> None:
        """Wait for the collectives that are under way."""
        for work in self.works:
            work.wait()
        self.works.clear()


def own_shard(flat: Tensor, layout: FlatLayout, rank: int) -> Tensor:
    """The part of a flat tensor that belongs to ``rank``."""
    positions = layout.shard(rank)
    return flat[positions.start : positions.stop]


def dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """The strides that autograd gives the parameter's gradient.

    Fused optimizers walk through parameter and gradient in memory order, and some do not check that both have the same.
    """
    return torch.empty_like(parameter, device="meta", memory_format=torch.preserve_format).stride()


def elements(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The elements of a tensor, ``[numel]``, in the order in which a dense parameter of its shape has them in memory.

    A view where the tensor has the strides of the parameter, else a copy.
    """
    stride = dense_stride(parameter)
    if tensor.stride() != stride:
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def stand_in(parameter: Tensor) -> Tensor:
    """A gradient of NaN that takes one element's memory; torch refuses to add to expanded tensors."""
    return torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def is_filled(stand_in: Tensor) -> bool:
    """Whether somebody has filled the tensor, as ``zero_grad(set_to_none=False)`` does: that, torch does not refuse."""
    return stand_in._version > 0
