"""What an optimizer steps in place of a model's parameters, and how its steps get into the weights.

[Note: main parameters]
The optimizer holds *main parameters* in the positions where the user put parameters of the model:

* of a sharded bucket, the run of the parameter's elements that lies in this rank's shard, as one dim (ZeRO stage 1,
  Rajbhandari et al., 2020). State exists for these elements only, and the work of the step is divided among the ranks.
  A rank may have no element of a parameter; it holds an empty one all the same, so that positions mean the same on all
  ranks, and ``zero_grad`` reaches every parameter;
* of a parameter below float32, a float32 copy: steps that are smaller than the weight's last bit add up there;
* of any other parameter, the parameter itself.

How its steps get into the weights is told in :mod:`lightning_moe.parallel.bucket_weights`.

[Note: when gathered weights are waited for]
The gathers begin right after the step, in the order in which forward will want the weights. Whoever reads a weight
too early would read the old one without an error, so all of them are waited for at once, except where two promises have
been made: by a module (:func:`gather_in_forward`), that its parameters are not read before its own forward, and by the
strategy, that nobody but the next forward pass reads weights. The module then waits as it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_moe.parallel.bucket_weights import BucketWeights
from lightning_moe.parallel.buckets import Bucket
from lightning_moe.parallel.slots import Slot, elements, stand_in

_MARK = "_gather_in_forward"


@dataclass(frozen=True, eq=False)
class MainParam:
    """A main parameter: what the optimizer holds in the place of a parameter of the model.

    Attributes:
        parameter: The model's parameter.
        main: What the optimizer steps, of at least float32. One dim if it is a run of the parameter's elements (of
            length 0 where this rank has none of them), else in the parameter's own shape.
        run: Positions of the parameter's elements that ``main`` holds, in the order of memory; None for all of them.
    """

    parameter: nn.Parameter
    main: nn.Parameter
    run: range | None


def gather_in_forward(module: nn.Module, *others: nn.Module) -> None:
    """Promise that the parameters of ``module``, and of ``others``, are not read before the forward of ``module``.

    Updated weights may then arrive while what comes before it computes. Blocks of a network usually keep this promise.
    ``others`` are modules without a forward of their own, such as an output projection that a loss applies in chunks.
    """
    module.__dict__[_MARK] = (module, *others)  # past nn.Module, which would register them once more


def gathered_in_forward(root: nn.Module) -> set[nn.Parameter]:
    """The parameters under ``root`` that a promise has been made for."""
    return {p for module in root.modules() for p in _promised(module)}


def _promised(module: nn.Module) -> list[nn.Parameter]:
    return [p for each in module.__dict__.get(_MARK, ()) for p in each.parameters()]


class MainParams:
    """The main parameters of some optimizers.

    Args:
        optimizers: Optimizers that hold parameters of the model, which main parameters will take the place of.
    """

    def __init__(self, optimizers: Sequence[Optimizer] = ()) -> None:
        self.overlap = False
        """Whether marked modules wait for their own weights; else all are waited for at the end of the step."""
        self._optimizers = list(optimizers)
        self._by_main: dict[Tensor, MainParam] = {}
        self._weights: list[BucketWeights] = []
        self._wait_in_forward: set[Bucket] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for optimizer in self._optimizers:
            handle = optimizer.register_step_post_hook(self._after_step)
            # The user's own hooks may read weights, and find them complete.
            optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
            self._handles.append(handle)

    @property
    def by_main(self) -> dict[Tensor, MainParam]:
        """Every main parameter that is not the model's own."""
        return self._by_main

    def shards(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` steps parts of parameters."""
        held = (self._by_main.get(p) for group in optimizer.param_groups for p in group["params"])
        return any(each is not None and each.run is not None for each in held)

    def held(self) -> set[Tensor]:
        """What the optimizers hold now."""
        return {p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def adopt(self, bucket: Bucket) -> None:
        """Make main parameters for a bucket's parameters, and let the optimizers hold them."""
        held = self.held()
        slots = [slot for slot in bucket.slots if slot.parameter in held]
        precise = bucket.slots[0].parameter.dtype == bucket.grads.dtype
        if not slots or (precise and not bucket.sharded):
            return
        weights = BucketWeights(bucket)
        if bucket.sharded:
            assert len(slots) == len(bucket.slots)
            weights.flatten()
        made = {slot.parameter: _make_main(slot, weights) for slot in slots}
        self._by_main.update({each.main: each for each in made.values()})
        for optimizer in self._optimizers:
            _replace(optimizer, made)
        self._weights.append(weights)

    def overlap_with(self, root: nn.Module) -> None:
        """Let the marked modules under ``root`` wait for their own weights when they are called."""
        in_forward = gathered_in_forward(root)
        of_parameter = {
            slot.parameter: weights
            for weights in self._weights
            if weights.bucket.sharded and all(slot.parameter in in_forward for slot in weights.bucket.slots)
            for slot in weights.bucket.slots
        }
        for module in root.modules():
            waits = list(dict.fromkeys(of_parameter[p] for p in _promised(module) if p in of_parameter))
            if waits:
                self._handles.append(module.register_forward_pre_hook(_WaitFor(waits), prepend=True))
        self._wait_in_forward = {weights.bucket for weights in of_parameter.values()}
        self.overlap = bool(of_parameter)

    def wait(self, *, marked: bool = True) -> None:
        """Wait for gathered weights; on CUDA only the current stream waits.

        Args:
            marked: Also for those of marked modules, which would otherwise wait themselves.
        """
        for weights in self._weights:
            if marked or weights.bucket not in self._wait_in_forward:
                weights.wait()

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow weights that somebody else has written, e.g. by loading a checkpoint.

        A main weight of higher precision is kept where it rounds to the weight, and replaced by it elsewhere.
        """
        self.wait()
        for weights in self._weights:
            weights.follow_moved()
            weights.follow_values()

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], module: nn.Module) -> None:
        """Take over main weights by the names of the model's parameters; call :meth:`refresh` after it.

        Args:
            values: Tensors in the shapes of the main parameters.
            module: The model.
        """
        names = {parameter: name for name, parameter in module.named_parameters()}
        for each in self._by_main.values():
            value = values.get(names.get(each.parameter, ""))
            if value is not None:
                each.main.copy_(value)

    @torch.no_grad()
    def follow(self) -> None:
        """Follow weights that somebody has written or replaced, as far as this is seen without reading them."""
        for weights in self._weights:
            if weights.follow_moved() or weights.read_versions() != weights.versions:
                weights.wait()
                weights.follow_values()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Bring what the optimizer has stepped into the weights.

        There is no hook before the step that waits for the gathers of the step before: Lightning runs forward and
        backward inside of ``optimizer.step``, so it would wait before forward. The strategy waits after forward.
        """
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for weights in reversed(self._weights):  # buckets are in the order of backward
            slots = [slot for slot in weights.bucket.slots if slot.main is not None and slot.main in stepped]
            if slots:
                weights.take_step(slots)
        if not self.overlap or len(optimizer._optimizer_step_post_hooks) > 1 or _global_optimizer_post_hooks:
            self.wait()

    @torch.no_grad()
    def close(self, *, wait: bool = True) -> None:
        """Detach from modules and optimizers, and free the buffers.

        Optimizers keep their main parameters, for a checkpoint after training, but in host memory and without
        gradients: as Lightning leaves a model and the optimizers' state.

        Args:
            wait: Whether to wait for the weights; False after an error, when other ranks may be gone.
        """
        if wait:
            self.wait()
        for handle in self._handles:
            handle.remove()
        self._handles, self._weights, self._wait_in_forward = [], [], set()
        for main in self._by_main:
            main.grad = None
            main.data = main.data.cpu()


def _make_main(slot: Slot, weights: BucketWeights) -> MainParam:
    bucket, parameter = weights.bucket, slot.parameter
    if bucket.sharded:
        shard = weights.own if weights.shard is None else weights.shard
        start = slot.view.storage_offset() + slot.run.start - bucket.layout.shard(bucket.rank).start
        start = min(max(start, 0), bucket.layout.shard_size)  # of an empty run
        slot.main = nn.Parameter(shard[start : start + len(slot.run)])
        slot.main_grad = bucket.shard[start : start + len(slot.run)]
    else:
        slot.main = nn.Parameter(parameter.detach().to(slot.view.dtype))
        slot.main_grad = slot.view
    slot.elsewhere = stand_in(parameter), stand_in(slot.main)
    return MainParam(parameter, slot.main, slot.run if bucket.sharded else None)


def _replace(optimizer: Optimizer, mains: Mapping[nn.Parameter, MainParam]) -> None:
    """Put main parameters where the parameters are, in the groups and in the state."""
    for group in optimizer.param_groups:
        group["params"] = [mains[p].main if p in mains else p for p in group["params"]]
    for parameter in mains.keys() & optimizer.state.keys():  # some optimizers make their state at once
        state, run = optimizer.state.pop(parameter), mains[parameter].run
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                part = value if run is None else elements(value, parameter)[run.start : run.stop].clone()
                state[key] = part.to(mains[parameter].main.dtype) if part.is_floating_point() else part
        optimizer.state[mains[parameter].main] = state


class _WaitFor:
    """Forward pre-hook of a module that waits for its weights."""

    def __init__(self, weights: Sequence[BucketWeights]) -> None:
        self._weights = weights

    def __call__(self, *_: Any) -> None:
        for each in self._weights:
            each.wait()

    def __reduce__(self) -> tuple[Any, ...]:
        return _WaitFor, ((),)  # a copied module takes its hooks along; its weights are its own
