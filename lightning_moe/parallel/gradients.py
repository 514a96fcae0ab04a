"""Reduction of dense and expert gradients in flat buckets, overlapped with the backward pass.

[Note: what a bucket holds]
Gradients live in flat *main-grad* buckets of at least float32. A dense bucket is reduced over ``data_context`` (over
``data_context_tensor`` where each tensor rank has a part of the gradient), an expert bucket over ``expert_data``; all
are divided by the size of ``data_context``, because the loss is a mean over those ranks: an expert's gradient already
holds the sum over the ranks that sent it tokens, so dividing it by the number of its replicas would make it ``expert``
times too large (see ``docs/concepts/expert-parallelism.md``).

Behind a bucket's gradients stands one flag per parameter, "this rank used it". The flags travel with the same
all-reduce, so that a parameter which no rank used keeps ``grad=None``, as in a single process: a zero gradient would
let AdamW decay its weights.

[Note: who owns ``parameter.grad``]
Lightning, optimizers and users may set ``parameter.grad`` to None at any time (``zero_grad``), and that is the only
signal that accumulation starts over. For parameters whose dtype is the bucket's, ``grad`` is a view of the bucket, so
autograd accumulates in place. A low-precision parameter's ``grad`` is a copy: it is set aside before each backward, new
contributions are added to the float32 bucket, and a fresh copy is handed out at the end.

[Note: two ways into a bucket]
Layers that describe their weight gradients (see :mod:`lightning_moe.weight_grad`) write them into the bucket without
passing through autograd; everything else arrives in ``parameter.grad``. A tied embedding uses both. A parameter is
complete when autograd's node that accumulates its gradient has run: the node waits for all uses of the parameter, and
runs even when none of them returned a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import partial_grads, replica_axis_of, sharded_parameters
from lightning_moe.weight_grad.sink import WeightGrad, attach_sink, detach_sink


@dataclass(eq=False)
class _Slot:
    """One parameter's place in its bucket."""

    name: str
    parameter: nn.Parameter
    view: Tensor
    node: torch.autograd.graph.Node
    """Autograd's node that accumulates the gradient; its hooks live as long as it is referred to."""
    fresh: bool = True
    """Whether the next contribution replaces what the bucket holds."""
    used: bool = False
    """Whether this rank has contributed since accumulation started."""
    arrived: bool = False
    """Whether this backward pass has reached the parameter."""
    copy: Tensor | None = None
    """The low-precision gradient that was handed out, with its version at that time."""
    copy_version: int = 0


@dataclass(eq=False)
class _Bucket:
    """A flat buffer ``[gradients | one flag per parameter]`` with the group it is reduced over."""

    buffer: Tensor
    flags: Tensor
    slots: list[_Slot]
    group: dist.ProcessGroup | None
    scale: float
    """What the sum over the group is multiplied by to give the mean over ``data_context``."""
    undo: float
    """What a reduced bucket is multiplied by so that reducing it again leaves it as it is."""
    missing: int = 0
    issued: bool = False
    reduced: bool = False
    work: dist.Work | None = field(default=None)


class _Sink:
    """Takes a parameter's weight gradients into its slot while a backward pass of the strategy is under way."""

    def __init__(self, reducer: GradientReducer, slot: _Slot, bucket: _Bucket) -> None:
        self._reducer, self._slot, self._bucket = reducer, slot, bucket

    def take(self, grad: WeightGrad) -> bool:
        slot = self._slot
        # With create_graph=True the gradient itself is to be differentiated.
        if not self._reducer.armed or torch.is_grad_enabled() or _has_hooks(slot.parameter):
            return False
        _check_open(slot, self._bucket)
        grad.add_to(slot.view, accumulate=not slot.fresh)
        slot.fresh, slot.used = False, True
        if slot.parameter.dtype == slot.view.dtype:
            slot.parameter.grad = slot.view  # what autograd still brings is added to it
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickled parameter takes its attributes along; the reducer stays here


class GradientReducer:
    """Owns the main-grad buckets of a module and reduces them during backward.

    Args:
        module: Module whose trainable parameters are reduced; sharded ones carry a ShardSpec.
        mesh: The parallel mesh.
        bucket_bytes: Size at which a bucket is closed. Small buckets start early, large ones use the links better.
    """

    def __init__(self, module: nn.Module, mesh: ParallelMesh, bucket_bytes: int) -> None:
        self._module = module
        self._mesh = mesh
        self._bucket_bytes = bucket_bytes
        self._sync = True
        self._armed = False
        self._next = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._buckets: list[_Bucket] = []
        self._slots: dict[nn.Parameter, _Slot] = {}
        self._build()

    @property
    def armed(self) -> bool:
        """Whether a backward pass is prepared or under way."""
        return self._armed

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate without communication."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def arm(self) -> None:
        """Prepare for a backward pass; call :meth:`finish` at its end."""
        if any(p.requires_grad and p not in self._slots for p in self._module.parameters()):
            self._build()  # parameters have been unfrozen
        for bucket in self._buckets:
            if bucket.work is not None:  # left by a backward pass that ended in an exception
                bucket.work.wait()
                bucket.work = None
            for slot in bucket.slots:
                self._take_grad(slot)
            if bucket.reduced and not all(slot.fresh for slot in bucket.slots):
                bucket.buffer.mul_(bucket.undo)
            bucket.reduced = bucket.issued = False
            bucket.missing = len(bucket.slots)
        self._next = 0
        self._armed = True

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what is left, wait for all buckets and hand the gradients out. Does nothing unless armed."""
        if not self._armed:
            return
        self._armed = False
        if self._sync:
            for bucket in self._buckets[self._next :]:
                self._reduce(bucket)
        for bucket in self._buckets:
            self._hand_out(bucket)

    def close(self) -> None:
        """Detach from the parameters; their gradients stay as they are."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._slots:
            detach_sink(parameter)
        self._handles, self._buckets, self._slots = [], [], {}

    def _build(self) -> None:
        """Add buckets for trainable parameters that have none; a parameter keeps its bucket when it is frozen."""
        open_buckets: dict[tuple[Axis, torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
        closed = []
        partial_params = partial_grads(self._module)
        # Backward reaches the last layers first, so buckets filled in reverse order complete in the order of creation.
        for name, parameter, specs in reversed(sharded_parameters(self._module)):
            if not parameter.requires_grad or parameter in self._slots:
                continue
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            axis = replica_axis_of(specs, partial_grad=parameter in partial_params)
            key = (axis, dtype, parameter.device)
            members = open_buckets.setdefault(key, [])
            members.append((name, parameter))
            if sum(p.numel() for _, p in members) * dtype.itemsize >= self._bucket_bytes:
                closed.append((key, open_buckets.pop(key)))
        for key, members in [*closed, *open_buckets.items()]:
            bucket = self._allocate(*key, members)
            self._buckets.append(bucket)
            for slot in bucket.slots:
                self._slots[slot.parameter] = slot
                attach_sink(slot.parameter, _Sink(self, slot, bucket))
                on_grad, on_complete = partial(self._on_grad, slot, bucket), partial(self._on_complete, slot, bucket)
                self._handles.append(slot.parameter.register_post_accumulate_grad_hook(on_grad))
                self._handles.append(slot.node.register_hook(on_complete))

    def _allocate(
        self, axis: Axis, dtype: torch.dtype, device: torch.device, members: list[tuple[str, nn.Parameter]]
    ) -> _Bucket:
        elements = sum(parameter.numel() for _, parameter in members)
        buffer = torch.zeros(elements + len(members), dtype=dtype, device=device)
        views = buffer[:elements].split([parameter.numel() for _, parameter in members])
        slots = [
            _Slot(
                name,
                parameter,
                view.as_strided(parameter.shape, _dense_stride(parameter)),
                torch.autograd.graph.get_gradient_edge(parameter).node,
            )
            for (name, parameter), view in zip(members, views, strict=True)
        ]
        replicas, data_ranks = self._mesh.size(axis), self._mesh.size(Axis.DATA_CONTEXT)
        group = self._mesh.group(axis) if replicas > 1 else None
        return _Bucket(buffer, buffer[elements:], slots, group, 1 / data_ranks, data_ranks / replicas)

    def _take_grad(self, slot: _Slot) -> None:
        """Bring the bucket in line with ``parameter.grad`` before backward adds to it."""
        grad = slot.parameter.grad
        slot.arrived = False
        slot.fresh = grad is None
        slot.used = grad is not None
        if grad is None:
            return
        if grad.dtype != slot.view.dtype:
            if grad is not slot.copy or grad._version != slot.copy_version:
                slot.view.copy_(grad)  # somebody has changed it, e.g. zero_grad(set_to_none=False)
            slot.parameter.grad = slot.copy = None
        elif grad is not slot.view:
            slot.view.copy_(grad)
            slot.parameter.grad = slot.view

    @torch.no_grad()  # with create_graph=True hooks run in grad mode
    def _on_grad(self, slot: _Slot, bucket: _Bucket, parameter: Tensor) -> None:
        """Bring what autograd has accumulated into the bucket."""
        grad = parameter.grad
        if not self._armed or grad is None:
            return  # a backward that Lightning does not run, e.g. inside a gradient penalty; or all went to the sink
        _check_open(slot, bucket)
        if grad.is_sparse:
            raise ConfigError(
                f"parameter {slot.name}",
                "sparse gradient",
                "dense gradients",
                "use nn.Embedding(sparse=False)",
            )
        if grad is not slot.view:
            if grad.dtype == slot.view.dtype or slot.fresh:
                slot.view.copy_(grad)
            else:
                slot.view.add_(grad)
            parameter.grad = slot.view if grad.dtype == slot.view.dtype else None
        slot.fresh, slot.used = False, True

    @torch.no_grad()
    def _on_complete(self, slot: _Slot, bucket: _Bucket, *_: object) -> None:
        """Count the parameter as complete, and reduce its bucket if it was the last one."""
        if not self._armed or slot.arrived:
            return
        slot.arrived = True
        bucket.missing -= 1
        # Buckets go strictly in order: ranks may reach parameters in different orders, and collectives that are
        # issued in different orders deadlock.
        while self._sync and self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._reduce(self._buckets[self._next])
            self._next += 1

    def _reduce(self, bucket: _Bucket) -> None:
        bucket.issued = True
        for slot in bucket.slots:
            if slot.fresh:
                slot.view.zero_()
        if all(slot.used for slot in bucket.slots):
            bucket.flags.fill_(1.0)
        else:
            bucket.flags.copy_(torch.tensor([float(slot.used) for slot in bucket.slots]))
        if bucket.group is not None:
            bucket.work = dist.all_reduce(bucket.buffer, group=bucket.group, async_op=True)

    def _hand_out(self, bucket: _Bucket) -> None:
        if self._sync:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            bucket.buffer.mul_(bucket.scale)
            bucket.reduced = True
            if not all(slot.used for slot in bucket.slots):  # reading the flags waits for the device: only if needed
                for slot, flag in zip(bucket.slots, bucket.flags.tolist(), strict=True):
                    slot.used = abs(flag) > 0  # a complex bucket has complex flags
        for slot in bucket.slots:
            if not slot.used:
                slot.parameter.grad = None
            elif slot.parameter.dtype == slot.view.dtype:
                slot.parameter.grad = slot.view
            else:
                slot.parameter.grad = slot.copy = slot.view.to(slot.parameter.dtype)
                slot.copy_version = slot.copy._version


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Whether somebody else has registered hooks on the parameter: autograd would call them without a gradient."""
    ours = 1
    return bool(parameter._backward_hooks) or len(parameter._post_accumulate_grad_hooks) > ours


def _check_open(slot: _Slot, bucket: _Bucket) -> None:
    if bucket.issued:
        # Re-entrant checkpoints run backward passes of their own, so a weight that several of them share arrives
        # once for each; what arrives after the reduction has begun would be lost on some ranks.
        raise ConfigError(
            f"parameter {slot.name}",
            "gradient that arrives more than once",
            "one arrival for each backward pass",
            "use torch.utils.checkpoint with use_reentrant=False",
        )


def _dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """The strides that autograd gives the parameter's gradient.

    Fused optimizers walk through parameter and gradient in memory order, and some do not check that both have the same.
    """
    return torch.empty_like(parameter, device="meta", memory_format=torch.preserve_format).stride()
