"""Reduction of dense and expert gradients in flat buckets, overlapped with the backward pass.

What a bucket holds is told in :mod:`lightning_moe.parallel.buckets`, who owns ``parameter.grad`` in
:mod:`lightning_moe.parallel.slots`, and on which ways gradients come in :mod:`lightning_moe.parallel.sinks`.

[Note: a step of many backward passes]
A pipeline step is one backward pass for each microbatch and chunk, and the weight gradients of some of them come later,
out of a queue. A parameter is then complete when the last pass of each of its chunks has reached it and the queue holds
nothing of it any more. Which chunks those are is seen in the steps before; in the first one all buckets are reduced at
the end. A tied embedding brings gradients on both ways; they are summed apart, as they are where embedding and output
projection are on different ranks. The step runs inside of ``training_step``, before Lightning's ``zero_grad``: between
its end and the backward of the loss no parameter has a gradient, and what is in the buckets is safe.

[Note: whose gradients are taken]
Only those of the passes that the strategy runs. Before and after them, and between the passes of a pipeline step, a
module may run backward by itself, in a gradient penalty for instance: what that leaves in ``parameter.grad`` is its own
affair. But what arrives while the gradients of a pipeline step wait to be handed out is refused. It is the gradient of
another loss that was added to the step's, and it comes when buckets may have been reduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial

import torch
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.buckets import Bucket, Member, main_dtype, make_bucket
from lightning_moe.parallel.collectives import start_all_gather
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParams, gathered_in_forward
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import partial_grads, replica_axis_of, sharded_parameters, tied_parameters
from lightning_moe.parallel.sinks import BucketSink
from lightning_moe.parallel.slots import Slot, elements
from lightning_moe.weight_grad.queue import WeightGradQueue
from lightning_moe.weight_grad.sink import attach_sink, detach_sink

_Kind = tuple[Axis, torch.dtype, torch.device, bool, bool]
"""What parameters of one bucket have in common: axis of their replicas, dtype, device, whether an optimizer holds them,
whether they are read in forward only. Not whether they are sharded: the order of sums follows the buckets."""


class _Phase(Enum):
    """What the reducer expects."""

    IDLE = auto()
    BACKWARD = auto()
    """A backward pass is prepared or under way."""
    SCHEDULE = auto()
    """A pipeline step is, between its backward passes."""
    PASS = auto()
    """One of its backward passes is under way."""
    HELD = auto()
    """Its gradients wait to be handed out."""


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
        self._phase = _Phase.IDLE
        self._pass = (0, True)  # chunk, and whether it is the chunk's last pass of the step
        self._next = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._buckets: list[Bucket] = []
        self._places: dict[Tensor, tuple[Slot, Bucket]] = {}
        self._build()

    @property
    def armed(self) -> bool:
        """Whether a backward pass is prepared or under way."""
        return self._phase is not _Phase.IDLE

    @property
    def takes(self) -> bool:
        """Whether gradients that arrive now are the step's; see the last note at the head of this file."""
        return self._phase in (_Phase.BACKWARD, _Phase.PASS)

    @property
    def in_schedule(self) -> bool:
        """Whether a pipeline step is under way."""
        return self._phase in (_Phase.SCHEDULE, _Phase.PASS)

    @property
    def holds_schedule(self) -> bool:
        """Whether the gradients of a pipeline step wait to be handed out."""
        return self._phase is _Phase.HELD

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate without communication."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def begin_schedule(self, *, fresh: bool) -> None:
        """Prepare for the backward passes of a pipeline step; call :meth:`end_schedule`, and later :meth:`finish`.

        Args:
            fresh: Whether accumulation starts over, as after ``zero_grad``.
        """
        if fresh:
            for bucket in self._buckets:
                for slot in bucket.slots:
                    slot.hide()
        self.arm()
        self._phase = _Phase.SCHEDULE

    def start_pass(self, chunk: int, *, final: bool) -> None:
        """A backward pass through ``chunk`` begins, the last one of the step if ``final``."""
        assert self.in_schedule
        self._phase, self._pass = _Phase.PASS, (chunk, final)

    def end_pass(self) -> None:
        """The backward pass has ended."""
        self._phase = _Phase.SCHEDULE

    def end_schedule(self) -> None:
        """All backward passes are done; until :meth:`finish` the parameters have no gradients."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                assert not slot.deferred, f"the queue still holds gradients of {slot.name}"
                slot.chunks |= slot.reached
                slot.hide()
        self._phase = _Phase.HELD

    @torch.no_grad()
    def arm(self) -> None:
        """Prepare for a backward pass; call :meth:`finish` at its end."""
        self._mains.follow()  # else the step would reach weights that the model has left behind
        if any(p.requires_grad and p not in self._places for p in self._module.parameters()):
            self._build()  # parameters have been unfrozen
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.forget_step()
            bucket.take_over()
        self._next = 0
        self._phase = _Phase.BACKWARD

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what is left, wait for all buckets and hand the gradients out. Does nothing unless armed."""
        if not self.armed:
            return
        self._phase = _Phase.IDLE
        if self._sync:
            for bucket in self._buckets[self._next :]:
                bucket.reduce()
        for bucket in self._buckets:
            if self._sync:
                bucket.finish_reduction()
            bucket.hand_out()

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

    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        """The reduced gradient of one of the model's parameters, wherever it is kept.

        A collective call on the ranks that hold the parameter, all of which must ask for the same one.

        Returns:
            A tensor in the (local) shape of the parameter, of at least float32; None if there is no gradient.
        """
        gathered: dict[Bucket, Tensor] = {}
        grad = self._full_grad(parameter, gathered)
        return grad.clone() if grad is not None and gathered else grad  # without the rest of its bucket

    def full_grads(self, parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
        """:meth:`full_grad` of several parameters, which may share memory: each bucket is gathered once."""
        gathered: dict[Bucket, Tensor] = {}
        return [self._full_grad(parameter, gathered) for parameter in parameters]

    @torch.no_grad()
    def _full_grad(self, parameter: nn.Parameter, gathered: dict[Bucket, Tensor]) -> Tensor | None:
        if parameter not in self._places:
            return parameter.grad
        slot, bucket = self._places[parameter]
        if slot.main is None:
            return parameter.grad
        if slot.main.grad is None or parameter.grad is None:
            return None
        if not bucket.sharded or not bucket.reduced:
            return slot.main.grad if bucket.reduced else slot.view
        if bucket not in gathered:
            assert bucket.group is not None
            gathered[bucket] = start_all_gather(bucket.shard, bucket.group).wait()
        start = slot.view.storage_offset() - bucket.grads.storage_offset()
        return gathered[bucket].as_strided(slot.view.shape, slot.view.stride(), start)

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
        self._phase = _Phase.IDLE

    def _build(self) -> None:
        """Add buckets for trainable parameters that have none; a parameter keeps its bucket when it is frozen."""
        open_buckets: dict[_Kind, list[Member]] = {}
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
            itemsize = main_dtype(parameter.dtype).itemsize
            if sum(p.numel() for _, p, _ in members) * itemsize >= self._bucket_bytes:
                closed.append((kind, open_buckets.pop(kind)))
        for (axis, _, _, is_held, _), members in [*closed, *open_buckets.items()]:
            bucket = make_bucket(members, axis, self._mesh, shard=self._shard and is_held)
            self._mains.adopt(bucket)
            self._buckets.append(bucket)
            for slot in bucket.slots:
                self._places[slot.parameter] = slot, bucket
                if slot.main is not None:
                    self._places[slot.main] = slot, bucket
                attach_sink(slot.parameter, BucketSink(self, slot, bucket))
                on_grad, on_complete = partial(self._on_grad, slot, bucket), partial(self._on_complete, slot, bucket)
                self._handles.append(slot.parameter.register_post_accumulate_grad_hook(on_grad))
                self._handles.append(slot.node.register_hook(on_complete))

    @torch.no_grad()  # with create_graph=True hooks run in grad mode
    def _on_grad(self, slot: Slot, bucket: Bucket, parameter: Tensor) -> None:
        """Bring what autograd has accumulated into the bucket."""
        grad = parameter.grad
        if grad is None:
            return  # all went to the sink
        if self.holds_schedule:
            raise ConfigError(
                f"parameter {slot.name}",
                "a gradient beside those of run_schedule",
                "the loss of run_schedule alone",
                "what is to be trained on besides goes into the loss of a part of the pipeline",
            )
        if not self.takes:
            return  # see the last note at the head of this file
        if slot.toggled_off:
            parameter.grad = None
            return
        self.check_open(slot, bucket)
        slot.add_from_autograd(grad)

    @torch.no_grad()
    def _on_complete(self, slot: Slot, bucket: Bucket, *_: object) -> None:
        """Autograd's node of the parameter has run."""
        if self._phase is _Phase.PASS:
            chunk, final = self._pass
            slot.reached.add(chunk)
            if final:
                slot.ended.add(chunk)
        if self.takes:
            self.count_if_complete(slot, bucket)

    def count_if_complete(self, slot: Slot, bucket: Bucket) -> None:
        """Count a parameter whose gradient is complete, and reduce its bucket if it was the last one."""
        if slot.arrived or slot.deferred:
            return
        if self.in_schedule and not (slot.chunks and slot.chunks <= slot.ended):
            return
        slot.arrived = True
        bucket.missing -= 1
        # Buckets go strictly in order: ranks may reach parameters in different orders, and collectives that are
        # issued in different orders deadlock.
        while self._sync and self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._buckets[self._next].reduce()
            self._next += 1

    def check_open(self, slot: Slot, bucket: Bucket) -> None:
        """Refuse what arrives after the reduction has begun: it would be lost on some ranks.

        Re-entrant checkpoints run backward passes of their own, so a weight that several of them share arrives once for
        each. Beside these there are parameters that a chunk of a pipeline uses for the first time.

        Raises:
            ConfigError: Names the parameter.
        """
        if not bucket.issued:
            return
        reentrant = "use torch.utils.checkpoint with use_reentrant=False"
        raise ConfigError(
            f"parameter {slot.name}",
            "gradient that arrives more than once",
            "one arrival for each backward pass, in a pipeline from the same chunks as in the steps before",
            f"{reentrant}; use a shared parameter in all of its chunks from the first step on"
            if self.in_schedule
            else reentrant,
        )
