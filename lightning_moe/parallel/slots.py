"""One parameter's place in a bucket, and the way of its gradient into the bucket and out of it.

[Note: who owns ``parameter.grad``]
Lightning, optimizers and users may set a gradient to None at any time (``zero_grad``), and that is the only signal that
accumulation starts over. For parameters whose dtype is the bucket's, ``grad`` is a view of the bucket, so autograd
accumulates in place. A low-precision parameter's ``grad`` is a copy: it is set aside before each backward, new
contributions are added to the float32 bucket, and a fresh copy is handed out at the end.

Where the optimizer steps a main parameter, the gradient is in one place: in ``parameter.grad`` while it is this rank's
own, and in the main parameter's once it is reduced. The other one holds NaN, of one element that is expanded to the
shape. So ``zero_grad`` is noticed on either of them, code that reads the wrong one sees NaN rather than a part of a
gradient, and code that adds to it or scales it fails: torch refuses to do so in place with expanded tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_moe.errors import ConfigError


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
    """Whether this pipeline step brings gradients past autograd."""
    apart: Tensor | None = None
    """The sum of what autograd has brought beside them, float32 at least."""
    chunks: set[int] = field(default_factory=set)
    """Chunks of a pipeline whose backward passes have reached the parameter in earlier steps."""
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

    @property
    def toggled_off(self) -> bool:
        """Whether ``LightningModule.toggle_optimizer`` has frozen the parameter: it sees main parameters only."""
        return self.main is not None and not self.main.requires_grad

    def forget_step(self) -> None:
        """Drop what is known of a pipeline step, which may have ended in an exception."""
        self.deferred = self.sunk = False
        self.apart = None
        self.reached.clear()
        self.ended.clear()

    def take_over(self, *, reduced: bool) -> None:
        """Bring the bucket in line with the gradients that were handed out, before backward adds to it.

        Args:
            reduced: Whether they were the reduced ones.
        """
        parameter, main = self.parameter, self.main
        grad = parameter.grad
        self.arrived = False
        self.fresh = grad is None or (main is not None and main.grad is None)
        if main is not None:
            assert self.elsewhere is not None
            if grad is not None and grad is not self.elsewhere[0] and (self.hidden or reduced):
                _refuse_replaced_grad(self)
            if any(map(is_filled, self.elsewhere)):
                self.fresh, self.elsewhere = True, (stand_in(parameter), stand_in(main))
        self.used = not self.fresh
        if main is not None:
            if reduced and not self.fresh and main.grad is not self.main_grad:
                assert main.grad is not None
                assert self.main_grad is not None
                self.main_grad.copy_(main.grad)
            main.grad = None
            if self.hidden or self.fresh or self.toggled_off:
                parameter.grad = None
                return
            if reduced:
                grad = parameter.grad = self.view
        if grad is None:
            return
        if grad.dtype != self.view.dtype:
            if grad is not self.copy or grad._version != self.copy_version:
                self.view.copy_(grad)  # somebody has changed it, e.g. zero_grad(set_to_none=False)
            parameter.grad = self.copy = None
        elif grad is not self.view:
            self.view.copy_(grad)
            parameter.grad = self.view

    def add_from_autograd(self, grad: Tensor) -> None:
        """Bring what autograd has accumulated in ``parameter.grad`` into the bucket."""
        if grad.is_sparse:
            raise ConfigError(
                f"parameter {self.name}", "sparse gradient", "dense gradients", "use nn.Embedding(sparse=False)"
            )
        parameter, same_dtype = self.parameter, grad.dtype == self.view.dtype
        if self.sunk:
            if grad is not self.apart:
                grad = grad.to(self.view.dtype)
                self.apart = grad if self.apart is None else self.apart.add_(grad)
            parameter.grad = self.apart if same_dtype else None
            return
        if grad is not self.view:
            if same_dtype or self.fresh:
                self.view.copy_(grad)
            else:
                self.view.add_(grad)
            parameter.grad = self.view if same_dtype else None
        self.fresh, self.used = False, True

    def sum_autograd_apart(self) -> None:
        """From here on this step's gradients from autograd are not added to those that go past it, until the end."""
        if not self.sunk:
            self.sunk = True
            self.parameter.grad = None  # it may be a view of the bucket, which autograd would add to

    def join(self) -> None:
        """Add what has been summed apart."""
        if self.apart is not None:
            self.view.add_(self.apart)
            self.apart = None

    def hand_out(self, *, reduced: bool) -> None:
        """Set the gradients of the parameter and of its main parameter; None if nobody has contributed.

        Args:
            reduced: Whether the bucket holds the reduced gradient.
        """
        parameter, main = self.parameter, self.main
        if main is not None:
            assert self.elsewhere is not None
            here, there = self.elsewhere
            main.grad = None if not self.used else self.main_grad if reduced else there
            if self.used and (reduced or self.hidden):
                parameter.grad = here
                return
        if not self.used:
            parameter.grad = None
        elif parameter.dtype == self.view.dtype:
            parameter.grad = self.view
        else:
            parameter.grad = self.copy = self.view.to(parameter.dtype)
            self.copy_version = self.copy._version

    def hide(self) -> None:
        """Set the gradients to None; what the bucket holds stays."""
        self.parameter.grad = None
        if self.main is not None:
            self.main.grad = None


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


def _refuse_replaced_grad(slot: Slot) -> None:
    raise ConfigError(
        f"parameter {slot.name}",
        "a gradient set by hand",
        "gradients of the optimizer's own parameters",
        "the optimizer steps main parameters: change the gradients in optimizer.param_groups, or use "
        "MoEStrategy(optimizer_sharding=False)",
    )
