"""Reduction of dense and expert gradients in flat buckets, overlapped with the backward pass.

[Note: what a bucket holds]
Gradients live in flat *main-grad* buckets of at least float32. A dense bucket is reduced over ``data_context`` (over
``data_context_tensor`` where each tensor rank has a part of the gradient), an expert bucket over ``expert_data``; all
are divided by the size of ``data_context``, because the loss is a mean over those ranks: an expert's gradient already
holds the sum over the ranks that sent it tokens, so dividing it by the number of its replicas would make it ``expert``
times too large (see ``docs/concepts/expert-parallelism.md``).

Every parameter has a flag, "this rank used it". The flags are summed like the gradients, so that a parameter which no
rank used keeps ``grad=None``, as in a single process: a zero gradient would let AdamW decay its weights. They lie
behind the gradients and travel with them, unless these are scattered. Sharded or not, a bucket has the same length,
because backends choose the order of their sums by it.

[Note: who owns ``parameter.grad``]
Lightning, optimizers and users may set a gradient to None at any time (``zero_grad``), and that is the only signal that
accumulation starts over. For parameters whose dtype is the bucket's, ``grad`` is a view of the bucket, so autograd
accumulates in place. A low-precision parameter's ``grad`` is a copy: it is set aside before each backward, new
contributions are added to the float32 bucket, and a fresh copy is handed out at the end.

Where the optimizer steps a main parameter, the gradient is in one place: in ``parameter.grad`` while it is this rank's
own, and in the main parameter's once it is reduced. The other one holds NaN, of one element that is expanded to the
shape. So ``zero_grad`` is noticed on either of them, code that reads the wrong one sees NaN rather than a part of a
gradient, and code that adds to it or scales it fails: torch refuses to do so in place with expanded tensors.

[Note: two ways into a bucket]
Layers that describe their weight gradients (see :mod:`lightning_moe.weight_grad`) write them into the bucket without
passing through autograd; everything else arrives in ``parameter.grad``. A tied embedding uses both. A parameter is
complete when autograd's node that accumulates its gradient has run: the node waits for all uses of the parameter, and
runs even when none of them returned a gradient.

[Note: a step of many backward passes]
A pipeline step is one backward pass for each microbatch and chunk, and the weight gradients of some of them come later,
out of a queue. A parameter is then complete when the last pass of each of its chunks has reached it and the queue holds
nothing of it any more. Which chunks those are is seen in the step before; in the first one all buckets are reduced at
the end. A tied embedding brings gradients on both ways; they are summed apart, as they are where embedding and output
projection are on different ranks. The step runs inside of ``training_step``, before Lightning's ``zero_grad``: between
its end and the backward of the loss no parameter has a gradient, and what is in the buckets is safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.buckets import Bucket, Slot, dense_stride, elements, is_filled, stand_in
from lightning_moe.parallel.collectives import start_all_gather, start_all_reduce_, start_reduce_scatter_
from lightning_moe.parallel.flat import FlatLayout
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParams, gathered_in_forward
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import (
    ShardSpecs,
    partial_grads,
    replica_axis_of,
    shard_axis_of,
    sharded_parameters,
    tied_parameters,
)
from lightning_moe.weight_grad.queue import WeightGradQueue
from lightning_moe.weight_grad.sink import WeightGrad, attach_sink, detach_sink

_Kind = tuple[Axis, torch.dtype, torch.device, bool, bool]
"""What parameters of one bucket have in common: axis of their replicas, dtype, device, whether an optimizer holds them,
whether they are read in forward only. Not whether they are sharded: the order of sums follows the buckets."""
_Member = tuple[str, nn.Parameter, ShardSpecs]


class _Sink:
    """Takes a parameter's weight gradients into its slot while a backward pass of the strategy is under way."""

    def __init__(self, reducer: GradientReducer, slot: Slot, bucket: Bucket) -> None:
        self._reducer, self._slot, self._bucket = reducer, slot, bucket

    @property
    def defers(self) -> bool:
        """Whether the gradients of this moment's backward pass are put off."""
        queue = self._reducer.queue
        return queue is not None and queue.capturing and self._takes and not _is_toggled_off(self._slot)

    def take(self, grad: WeightGrad, *, deferrable: bool = True) -> bool:
        """Accept a gradient, or leave it to autograd; see :class:`~lightning_moe.weight_grad.sink.WeightGradSink`."""
        if not self._takes:
            return False
        if _is_toggled_off(self._slot):
            return True
        if deferrable and self.defers:
            assert self._reducer.queue is not None
            self._slot.deferred = True
            self._reducer.queue.put(self, grad)
        else:
            assert not (deferrable and self._slot.deferred), "gradients of earlier microbatches wait in the queue"
            self.add(grad)
        return True

    def add(self, grad: WeightGrad) -> None:
        """Compute a gradient and add it to the bucket."""
        slot = self._slot
        _check_open(slot, self._bucket)
        grad.add_to(slot.view, accumulate=not slot.fresh)
        slot.fresh, slot.used, slot.sunk = False, True, True
        if slot.parameter.dtype == slot.view.dtype:
            # What autograd still brings is added to it.
            slot.parameter.grad = slot.apart if self._reducer.holds_schedule else slot.view

    def drained(self) -> None:
        """The queue holds nothing of the parameter any more."""
        self._slot.deferred = False
        self._reducer.count_if_complete(self._slot, self._bucket)

    @property
    def _takes(self) -> bool:
        # With create_graph=True the gradient itself is to be differentiated.
        return self._reducer.armed and not torch.is_grad_enabled() and not _has_hooks(self._slot.parameter)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickled parameter takes its attributes along; the reducer stays here


class GradientReducer:
    """Owns the main-grad buckets of a module and reduces them during backward.

    Args:
        module: Module whose trainable parameters are reduced; sharded ones carry a ShardSpec.
        mesh: The parallel mesh.
        bucket_bytes: Size at which a bucket is closed. Small buckets start early, large ones use the links better.
        mains: The main parameters; those of new buckets are made on the way.
        shard: Whether optimizers step shards: where they hold a parameter with replicas, its gradient is
            reduce-scattered, and each rank's part handed to the main parameter.
        queue: Where weight gradients wait that a pipeline schedule puts off.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: ParallelMesh,
        bucket_bytes: int,
        mains: MainParams | None = None,
        *,
        shard: bool = False,
        queue: WeightGradQueue | None = None,
    ) -> None:
        self.queue = queue
        self._module = module
        self._mesh = mesh
        self._bucket_bytes = bucket_bytes
        self._mains = mains or MainParams()
        self._shard = shard
        self._sync = True
        self._armed = False
        self._in_schedule = False
        self._pass = (0, True)  # chunk, and whether it is the chunk's last pass of the step
        self._next = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._buckets: list[Bucket] = []
        self._places: dict[Tensor, tuple[Slot, Bucket]] = {}
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

    @property
    def holds_schedule(self) -> bool:
        """Whether the gradients of a pipeline step wait to be handed out."""
        return self._armed and self._in_schedule

    def begin_schedule(self, *, fresh: bool) -> None:
        """Prepare for the backward passes of a pipeline step; call :meth:`end_schedule`, and later :meth:`finish`.

        Args:
            fresh: Whether accumulation starts over, as after ``zero_grad``.
        """
        self._in_schedule = False
        for bucket in self._buckets:
            for slot in bucket.slots:
                if fresh:
                    _hide(slot)
                slot.chunks = frozenset(slot.reached)
                slot.deferred = slot.sunk = False
                slot.apart = None
                slot.reached.clear()
                slot.ended.clear()
        self.arm()
        self._in_schedule = True

    def start_pass(self, chunk: int, *, final: bool) -> None:
        """A backward pass through ``chunk`` begins, the last one of the step if ``final``."""
        self._pass = chunk, final

    def end_schedule(self) -> None:
        """All backward passes are done; until :meth:`finish` the parameters have no gradients."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                assert not slot.deferred, f"the queue still holds gradients of {slot.name}"
                _hide(slot)

    @torch.no_grad()
    def arm(self) -> None:
        """Prepare for a backward pass; call :meth:`finish` at its end."""
        self._in_schedule = False
        self._mains.follow()  # else the step would reach weights that the model has left behind
        if any(p.requires_grad and p not in self._places for p in self._module.parameters()):
            self._build()  # parameters have been unfrozen
        for bucket in self._buckets:
            bucket.wait()  # for what a backward pass has left that ended in an exception
            for slot in bucket.slots:
                self._take_grad(slot, bucket)
            if bucket.reduced and not all(slot.fresh for slot in bucket.slots):
                _undo_reduction(bucket)
            bucket.reduced = bucket.issued = False
            bucket.missing = len(bucket.slots)
        self._next = 0
        self._armed = True

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what is left, wait for all buckets and hand the gradients out. Does nothing unless armed."""
        if not self._armed:
            return
        self._armed = self._in_schedule = False
        if self._sync:
            for bucket in self._buckets[self._next :]:
                _reduce(bucket)
        for bucket in self._buckets:
            self._hand_out(bucket)

    def own_grad(self, parameter: Tensor) -> tuple[Tensor, int] | None:
        """The elements of a reduced gradient that this rank answers for, so that every element is counted once.

        Args:
            parameter: A parameter that an optimizer holds: the model's, or a main parameter.

        Returns:
            The elements ``[n]`` that lie in this rank's shard, sharded optimizer or not, and how many ranks of the
            pipeline stage answer for the same ones; None if there is no gradient.
        """
        if parameter.grad is None or parameter not in self._places:
            return None
        slot, bucket = self._places[parameter]
        if slot.main is not None and bucket.sharded:
            return parameter.grad, slot.copies
        return elements(parameter.grad, slot.parameter)[slot.run.start : slot.run.stop], slot.copies

    @torch.no_grad()
    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        """The reduced gradient of one of the model's parameters, wherever it is kept.

        A collective call on the ranks that hold the parameter, all of which must ask for the same one.

        Returns:
            A tensor in the (local) shape of the parameter, of at least float32; None if there is no gradient.
        """
        if parameter not in self._places:
            return parameter.grad
        slot, bucket = self._places[parameter]
        if slot.main is None:
            return parameter.grad
        if slot.main.grad is None or parameter.grad is None:
            return None
        if not bucket.sharded or not bucket.reduced:
            return slot.main.grad if bucket.reduced else slot.view
        assert bucket.group is not None
        whole = start_all_gather(bucket.shard, bucket.group).wait()
        start = slot.view.storage_offset() - bucket.grads.storage_offset()
        return whole.as_strided(slot.view.shape, slot.view.stride(), start).clone()

    def close(self) -> None:
        """Detach from the parameters; their gradients stay as they are."""
        for handle in self._handles:
            handle.remove()
        for bucket in self._buckets:
            for slot in bucket.slots:
                detach_sink(slot.parameter)
                if slot.elsewhere is not None and slot.parameter.grad is slot.elsewhere[0]:
                    slot.parameter.grad = None
        self._handles, self._buckets, self._places = [], [], {}

    def _build(self) -> None:
        """Add buckets for trainable parameters that have none; a parameter keeps its bucket when it is frozen."""
        open_buckets: dict[_Kind, list[_Member]] = {}
        closed = []
        partial_params, tied, held = partial_grads(self._module), tied_parameters(self._module), self._mains.held()
        in_forward = gathered_in_forward(self._module)
        # Backward reaches the last layers first, so buckets filled in reverse order complete in the order of creation.
        for name, parameter, specs in reversed(sharded_parameters(self._module)):
            if not parameter.requires_grad or parameter in self._places:
                continue
            axis = replica_axis_of(specs, partial_grad=parameter in partial_params, tied=parameter in tied)
            kind = (axis, parameter.dtype, parameter.device, parameter in held, parameter in in_forward)
            members = open_buckets.setdefault(kind, [])
            members.append((name, parameter, specs))
            itemsize = _main_dtype(parameter.dtype).itemsize
            if sum(p.numel() for _, p, _ in members) * itemsize >= self._bucket_bytes:
                closed.append((kind, open_buckets.pop(kind)))
        for kind, members in [*closed, *open_buckets.items()]:
            bucket = self._allocate(*kind[:-1], members)
            self._mains.adopt(bucket)
            self._buckets.append(bucket)
            for slot in bucket.slots:
                self._places[slot.parameter] = slot, bucket
                if slot.main is not None:
                    self._places[slot.main] = slot, bucket
                attach_sink(slot.parameter, _Sink(self, slot, bucket))
                on_grad, on_complete = partial(self._on_grad, slot, bucket), partial(self._on_complete, slot, bucket)
                self._handles.append(slot.parameter.register_post_accumulate_grad_hook(on_grad))
                self._handles.append(slot.node.register_hook(on_complete))

    def _allocate(
        self, axis: Axis, dtype: torch.dtype, device: torch.device, held: bool, members: list[_Member]
    ) -> Bucket:
        mesh = self._mesh
        replicas, data_ranks = mesh.size(axis), mesh.size(Axis.DATA_CONTEXT)
        sharded = self._shard and held and replicas > 1
        holders = mesh.size(Axis.DATA_CONTEXT_TENSOR)
        if axis is Axis.TIED:  # on another stage, too
            holders = holders * replicas // data_ranks
        layout = FlatLayout((*(parameter.numel() for _, parameter, _ in members), len(members)), replicas)
        grads = torch.zeros(layout.total, dtype=_main_dtype(dtype), device=device)
        *offsets, behind = layout.offsets
        flags = grads[behind : behind + len(members)]
        slots = [
            Slot(
                name,
                parameter,
                grads.as_strided(parameter.shape, dense_stride(parameter), offset),
                layout.run(i, mesh.rank(axis)),
                holders // (replicas * _parts(specs, mesh)),
                torch.autograd.graph.get_gradient_edge(parameter).node,
            )
            for i, ((name, parameter, specs), offset) in enumerate(zip(members, offsets, strict=True))
        ]
        return Bucket(
            layout,
            grads,
            flags.clone() if sharded else flags,
            slots,
            mesh.active_group(axis),
            mesh.rank(axis),
            scale=1 / data_ranks,
            sharded=sharded,
        )

    def _take_grad(self, slot: Slot, bucket: Bucket) -> None:
        """Bring the bucket in line with the gradients that were handed out before backward adds to it."""
        parameter, main = slot.parameter, slot.main
        grad = parameter.grad
        slot.arrived = False
        slot.fresh = grad is None or (main is not None and main.grad is None)
        if main is not None:
            assert slot.elsewhere is not None
            if grad is not None and grad is not slot.elsewhere[0] and (slot.hidden or bucket.reduced):
                _refuse_replaced_grad(slot)
            if any(map(is_filled, slot.elsewhere)):
                slot.fresh, slot.elsewhere = True, (stand_in(parameter), stand_in(main))
        slot.used = not slot.fresh
        if main is not None:
            if bucket.reduced and not slot.fresh and main.grad is not slot.main_grad:
                assert main.grad is not None
                assert slot.main_grad is not None
                slot.main_grad.copy_(main.grad)
            main.grad = None
            if slot.hidden or slot.fresh or _is_toggled_off(slot):
                parameter.grad = None
                return
            if bucket.reduced:
                grad = parameter.grad = slot.view
        if grad is None:
            return
        if grad.dtype != slot.view.dtype:
            if grad is not slot.copy or grad._version != slot.copy_version:
                slot.view.copy_(grad)  # somebody has changed it, e.g. zero_grad(set_to_none=False)
            parameter.grad = slot.copy = None
        elif grad is not slot.view:
            slot.view.copy_(grad)
            parameter.grad = slot.view

    @torch.no_grad()  # with create_graph=True hooks run in grad mode
    def _on_grad(self, slot: Slot, bucket: Bucket, parameter: Tensor) -> None:
        """Bring what autograd has accumulated into the bucket."""
        grad = parameter.grad
        if not self._armed or grad is None:
            return  # a backward that Lightning does not run, e.g. inside a gradient penalty; or all went to the sink
        if _is_toggled_off(slot):
            parameter.grad = None
            return
        _check_open(slot, bucket)
        if grad.is_sparse:
            raise ConfigError(
                f"parameter {slot.name}",
                "sparse gradient",
                "dense gradients",
                "use nn.Embedding(sparse=False)",
            )
        if self._in_schedule and slot.sunk:
            if grad is not slot.apart:
                grad = grad.to(slot.view.dtype)
                slot.apart = grad if slot.apart is None else slot.apart.add_(grad)
            parameter.grad = slot.apart if parameter.dtype == slot.view.dtype else None
            return
        if grad is not slot.view:
            if grad.dtype == slot.view.dtype or slot.fresh:
                slot.view.copy_(grad)
            else:
                slot.view.add_(grad)
            parameter.grad = slot.view if grad.dtype == slot.view.dtype else None
        slot.fresh, slot.used = False, True

    @torch.no_grad()
    def _on_complete(self, slot: Slot, bucket: Bucket, *_: object) -> None:
        """Autograd's node of the parameter has run."""
        if not self._armed:
            return
        if self._in_schedule:
            chunk, final = self._pass
            slot.reached.add(chunk)
            if final:
                slot.ended.add(chunk)
        self.count_if_complete(slot, bucket)

    def count_if_complete(self, slot: Slot, bucket: Bucket) -> None:
        """Count a parameter whose gradient is complete, and reduce its bucket if it was the last one."""
        if not self._armed or slot.arrived or slot.deferred:
            return
        if self._in_schedule and not (slot.chunks and slot.chunks <= slot.ended):
            return
        slot.arrived = True
        bucket.missing -= 1
        # Buckets go strictly in order: ranks may reach parameters in different orders, and collectives that are
        # issued in different orders deadlock.
        while self._sync and self._next < len(self._buckets) and not self._buckets[self._next].missing:
            _reduce(self._buckets[self._next])
            self._next += 1

    def _hand_out(self, bucket: Bucket) -> None:
        for slot in bucket.slots:
            _join(slot)
        if self._sync:
            bucket.wait()
            (bucket.shard if bucket.sharded else bucket.grads).mul_(bucket.scale)
            bucket.reduced = True
            if not all(slot.used for slot in bucket.slots):  # reading the flags waits for the device: only if needed
                for slot, flag in zip(bucket.slots, bucket.flags.tolist(), strict=True):
                    slot.used = abs(flag) > 0  # a complex bucket has complex flags
        for slot in bucket.slots:
            parameter, main = slot.parameter, slot.main
            if main is not None:
                assert slot.elsewhere is not None
                here, there = slot.elsewhere
                main.grad = None if not slot.used else slot.main_grad if bucket.reduced else there
                if slot.used and (bucket.reduced or slot.hidden):
                    parameter.grad = here
                    continue
            if not slot.used:
                parameter.grad = None
            elif parameter.dtype == slot.view.dtype:
                parameter.grad = slot.view
            else:
                parameter.grad = slot.copy = slot.view.to(parameter.dtype)
                slot.copy_version = slot.copy._version


def _reduce(bucket: Bucket) -> None:
    bucket.issued = True
    for slot in bucket.slots:
        if slot.fresh:
            slot.view.zero_()
        _join(slot)
    if all(slot.used for slot in bucket.slots):
        bucket.flags.fill_(1.0)
    else:
        bucket.flags.copy_(torch.tensor([float(slot.used) for slot in bucket.slots]))
    if bucket.group is None:
        return
    if bucket.sharded:
        bucket.works.append(start_reduce_scatter_(bucket.grads, bucket.group).work)
        bucket.works.append(start_all_reduce_(bucket.flags, bucket.group).work)
    else:
        bucket.works.append(start_all_reduce_(bucket.grads, bucket.group).work)


def _join(slot: Slot) -> None:
    """Add what has been summed apart."""
    if slot.apart is not None:
        slot.view.add_(slot.apart)
        slot.apart = None


def _hide(slot: Slot) -> None:
    slot.parameter.grad = None
    if slot.main is not None:
        slot.main.grad = None


def _undo_reduction(bucket: Bucket) -> None:
    """Leave a reduced gradient to one rank, so that reducing it again, with what is added to it, counts it once."""
    shard = bucket.layout.shard(bucket.rank)
    bucket.grads[: shard.start].zero_()
    bucket.grads[shard.stop :].zero_()
    bucket.shard.div_(bucket.scale)


def _parts(specs: ShardSpecs, mesh: ParallelMesh) -> int:
    """Number of ranks that hold the whole parameter between them."""
    axis = shard_axis_of(specs)
    return 1 if axis is None else mesh.size(axis)


def _main_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_toggled_off(slot: Slot) -> bool:
    """Whether ``LightningModule.toggle_optimizer`` has frozen the parameter: it sees main parameters only."""
    return slot.main is not None and not slot.main.requires_grad


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Whether somebody else has registered hooks on the parameter: autograd would call them without a gradient."""
    ours = 1
    return bool(parameter._backward_hooks) or len(parameter._post_accumulate_grad_hooks) > ours


def _check_open(slot: Slot, bucket: Bucket) -> None:
    if bucket.issued:
        # Re-entrant checkpoints run backward passes of their own, so a weight that several of them share arrives
        # once for each; what arrives after the reduction has begun would be lost on some ranks.
        raise ConfigError(
            f"parameter {slot.name}",
            "gradient that arrives more than once",
            "one arrival for each backward pass",
            "use torch.utils.checkpoint with use_reentrant=False",
        )


def _refuse_replaced_grad(slot: Slot) -> None:
    raise ConfigError(
        f"parameter {slot.name}",
        "a gradient set by hand",
        "gradients of the optimizer's own parameters",
        "the optimizer steps main parameters: change the gradients in optimizer.param_groups, or use "
        "MoEStrategy(optimizer_sharding=False)",
    )
