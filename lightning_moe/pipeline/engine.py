"""Executes a rank's action list: computes its chunks, and exchanges tensors with the neighbouring stages.

[Note: what is kept between F and B]
A stage's outputs are sent, and backward starts from the edges of the graph that they belong to, so their memory is free
as soon as they have been sent. Inputs are leaves; what backward needs of them is kept by the graph itself.

[Note: autocast]
Each F runs in its own autocast region, as a step of one process would, and B and W run in none: backward would
otherwise multiply in the dtype that autocast thinks right, and not in the one that forward has used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.actions import Action, Actions, Kind
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput, PipelinedModel
from lightning_moe.pipeline.transport import Arrival, Edge, TensorSpec, Transport
from lightning_moe.weight_grad.queue import WeightGradQueue


class PassListener(Protocol):
    """What wants to know which backward pass is under way, as the gradient reducer does."""

    def start_pass(self, chunk: int, *, final: bool) -> None:
        """A backward pass through ``chunk`` begins, the last one of the step if ``final``."""
        ...

    def end_pass(self) -> None:
        """It has ended."""
        ...


@dataclass
class _Saved:
    """What a microbatch's backward through a chunk needs."""

    inputs: Carry
    """Leaves; those that require gradients send them back."""
    outputs: list[GradientEdge]
    """Where gradients from the next stage enter."""
    specs: list[TensorSpec]
    """Of the outputs that require gradients."""
    loss: GradientEdge | None
    loss_grad: Tensor | None


@dataclass
class StepTotals:
    """What this rank's parts add to a step's result."""

    loss: Tensor
    """Scalar, float64."""
    loss_dtype: torch.dtype = torch.float32
    """In which precision its terms were, at least float32."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    """The last part's predictions, by microbatch; empty elsewhere."""


class PipelineEngine:
    """Runs microbatches through the chunks that this rank holds.

    Args:
        model: The rank's parts.
        rank: This rank's position in the pipeline.
        placement: Which rank holds which stage.
        transport: Moves tensors between ranks; None for a pipeline of one rank.
        queue: Takes the weight gradients of B actions until their W.
        device: Where the tensors live.
        dynamic_shapes: Whether shapes may differ between microbatches whose own shapes are equal.
        forward_context: Makes the context of each F, e.g. autocast.
        defer_fused: Whether the weight gradients of a BW wait for its end, too. Exchanges inside the backward pass can
            then compute those of later layers while they wait.
    """

    def __init__(
        self,
        model: PipelinedModel,
        rank: int,
        placement: Placement,
        transport: Transport | None,
        queue: WeightGradQueue,
        device: torch.device,
        *,
        dynamic_shapes: bool = False,
        forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        defer_fused: bool = False,
    ) -> None:
        self._model = model
        self._rank, self._placement = rank, placement
        self._transport = transport
        self._queue = queue
        self._device = device
        self._dynamic = dynamic_shapes
        self._forward_context = forward_context
        self._defer_fused = defer_fused

    def train_step(
        self, actions: Actions, microbatches: Sequence[Microbatch], loss_grad: Tensor, listener: PassListener
    ) -> StepTotals:
        """Run forward and backward of all microbatches; gradients are accumulated where backward leaves them.

        Args:
            actions: What this rank does.
            microbatches: The microbatches.
            loss_grad: Gradient of the step's loss, scalar: 1, or what loss scaling and accumulation make of it.
            listener: Is told of every backward pass.
        """
        step = _Step(self, actions, microbatches, loss_grad, listener)
        try:
            # The strategy's own context may be autocast; see the note at the head of this file.
            with torch.autocast(self._device.type, enabled=False):
                return step.run()
        except BaseException:
            self._queue.clear()
            raise

    @torch.no_grad()
    def forward_step(self, actions: Actions, microbatches: Sequence[Microbatch]) -> StepTotals:
        """Run the F actions only.

        Args:
            actions: What this rank would do in training.
            microbatches: The microbatches; those of weight 0 count nowhere.
        """
        forward = tuple(action for action in actions if action.kind is Kind.F)
        with torch.autocast(self._device.type, enabled=False):
            return _Step(self, forward, microbatches, None, None).run()


class _Step:
    """One execution of an action list."""

    def __init__(
        self,
        engine: PipelineEngine,
        actions: Actions,
        microbatches: Sequence[Microbatch],
        loss_grad: Tensor | None,
        listener: PassListener | None,
    ) -> None:
        self._engine, self._actions, self._microbatches = engine, actions, microbatches
        self._loss_grad, self._listener = loss_grad, listener
        self._trains = loss_grad is not None
        self._saved: dict[tuple[int, int], _Saved] = {}
        self._arrivals: dict[tuple[Edge, int], Arrival] = {}
        self._handed: dict[tuple[Edge, int], list[Tensor]] = {}
        self._known: dict[tuple[Edge, Any], list[TensorSpec]] = {}
        self._specs_in: dict[tuple[Edge, int], list[TensorSpec]] = {}
        self._shapes = [_shapes_of(microbatch.data) for microbatch in microbatches]
        self._final = {action.chunk: i for i, action in enumerate(actions) if action.kind in (Kind.B, Kind.BW)}
        self._totals = StepTotals(torch.zeros((), dtype=torch.float64, device=engine._device))
        self._predictions: dict[int, Any] = {}

    def run(self) -> StepTotals:
        actions, transport = self._actions, self._engine._transport
        lookahead = 0 if transport is None or self._engine._dynamic else transport.lookahead
        tail = _tail(actions)
        for i, action in enumerate(actions[: len(actions) - len(tail)]):
            self._post(action, blocking=True)
            for ahead in actions[i + 1 : i + 1 + lookahead]:
                if not self._post(ahead, blocking=False):
                    break  # receives of an edge must be posted in order
            if action.kind is Kind.F:
                self._forward(action)
            elif action.kind is Kind.W:
                self._engine._queue.pop(action.microbatch, action.chunk)
            else:
                self._backward(action, final=self._final[action.chunk] == i)
        self._engine._queue.run_tail([(action.microbatch, action.chunk) for action in tail])
        if transport is not None:
            transport.finish()
        assert not self._saved, "a microbatch has had no backward"
        assert not self._handed, "a chunk has not taken what the one before it gave"
        self._totals.outputs = [self._predictions[k] for k in sorted(self._predictions)]
        return self._totals

    # ---- computing

    def _forward(self, action: Action) -> None:
        k, microbatch = action.microbatch, self._microbatches[action.microbatch]
        inputs = self._take(self._edge_in(action), k)
        with self._engine._forward_context():
            output = self._engine._model.run_part(action.chunk, inputs, microbatch)
        self._count(output, microbatch)
        edge = self._edge_out(action)
        if edge is not None:
            self._give(edge, k, output.carry)
        if not self._trains:
            return
        loss = output.loss
        roots = [] if edge is None else [tensor for tensor in output.carry if tensor.requires_grad]
        self._saved[k, action.chunk] = _Saved(
            inputs,
            [get_gradient_edge(root) for root in roots],
            [TensorSpec.of(root.detach()) for root in roots],
            get_gradient_edge(loss) if loss is not None and loss.requires_grad else None,
            None if loss is None else self._loss_grad_like(loss, microbatch),
        )

    def _backward(self, action: Action, *, final: bool) -> None:
        k, queue = action.microbatch, self._engine._queue
        saved = self._saved.pop((k, action.chunk))
        edges: list[GradientEdge] = list(saved.outputs)
        grads: list[Tensor | None] = []
        edge = self._gradient_edge(self._edge_out(action))
        if edge is not None and saved.outputs:
            grads += self._take(edge, k)
        if saved.loss is not None:
            edges.append(saved.loss)
            grads.append(saved.loss_grad)
        assert self._listener is not None
        self._listener.start_pass(action.chunk, final=final)
        deferred = action.kind is Kind.B or self._engine._defer_fused
        with queue.capture(k, action.chunk) if deferred else nullcontext():
            if edges:
                torch.autograd.backward(edges, grads)
        self._listener.end_pass()
        edge = self._gradient_edge(self._edge_in(action))
        leaves = [tensor for tensor in saved.inputs if tensor.requires_grad]
        if edge is not None and leaves:
            self._give(edge, k, tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves))
        if deferred and action.kind is Kind.BW:
            queue.pop(k, action.chunk)

    def _loss_grad_like(self, loss: Tensor, microbatch: Microbatch) -> Tensor:
        assert self._loss_grad is not None
        if loss.numel() != 1:
            raise ConfigError("loss", f"shape {tuple(loss.shape)}", "one number", "return the mean over the samples")
        return (self._loss_grad * microbatch.weight).to(loss.dtype).expand(loss.shape)

    def _count(self, output: PartOutput, microbatch: Microbatch) -> None:
        if not microbatch.weight:
            return
        if output.loss is not None:
            self._totals.loss_dtype = torch.promote_types(self._totals.loss_dtype, output.loss.dtype)
            self._totals.loss += microbatch.weight * output.loss.detach().double().sum()
        for name, value in output.metrics.items():
            if not isinstance(value, Tensor):
                raise ConfigError(f"metrics.{name}", value, "a tensor", "torch.tensor(...) makes one of a number")
            value, before = value.detach().to(self._engine._device), self._totals.metrics.get(name)
            self._totals.metrics[name] = value.clone() if before is None else before + value
        if not self._trains and output.output is not None:
            self._predictions[microbatch.index] = output.output

    # ---- exchanging

    def _edge_in(self, action: Action) -> Edge | None:
        stage = self._engine._placement.stage(self._engine._rank, action.chunk)
        return None if stage == 0 else Edge(stage - 1, "activation")

    def _edge_out(self, action: Action) -> Edge | None:
        stage = self._engine._placement.stage(self._engine._rank, action.chunk)
        return None if stage == self._engine._placement.num_stages - 1 else Edge(stage, "activation")

    @staticmethod
    def _gradient_edge(edge: Edge | None) -> Edge | None:
        return None if edge is None else Edge(edge.boundary, "gradient")

    def _is_local(self, edge: Edge) -> bool:
        sender, receiver = (self._engine._placement.location(stage)[0] for stage in edge.stages)
        return sender == receiver

    def _give(self, edge: Edge, k: int, tensors: Carry) -> None:
        """Hand tensors to the stage at the edge's end."""
        if self._is_local(edge):
            self._handed[edge, k] = [_leaf_like(tensor, self._trains) for tensor in tensors]
            return
        transport = self._engine._transport
        assert transport is not None
        if edge.kind == "activation":
            specs = [TensorSpec.of(tensor) for tensor in tensors]
            known = self._known.setdefault((edge, self._shapes[k]), specs)
            if self._engine._dynamic or known is specs:
                transport.send_specs(edge, specs)
            elif known != specs:
                raise ConfigError(
                    "pipeline.dynamic_shapes",
                    False,
                    "true where tensors between stages have other shapes for equal microbatches",
                    f"microbatch {k} gives {specs}, one before it gave {known}",
                )
        transport.send(edge, tensors)

    def _take(self, edge: Edge | None, k: int) -> Carry:
        """The tensors that the stage at the edge's beginning has handed over."""
        if edge is None:
            return ()
        if self._is_local(edge):
            return tuple(self._handed.pop((edge, k)))
        tensors = self._arrivals.pop((edge, k)).wait()
        if edge.kind == "activation" and self._trains:
            specs = self._specs_in.pop((edge, k))
            for tensor, spec in zip(tensors, specs, strict=True):
                tensor.requires_grad_(spec.requires_grad)
        return tuple(tensors)

    def _post(self, action: Action, *, blocking: bool) -> bool:
        """Begin to receive what an action needs, unless it is under way.

        Args:
            action: The action.
            blocking: Whether to wait for the sender to say what will come, where that is not known.

        Returns:
            Whether all that it needs is under way.
        """
        edge = self._edge_in(action) if action.kind is Kind.F else self._gradient_edge(self._edge_out(action))
        k = action.microbatch
        if action.kind is Kind.W or edge is None or self._is_local(edge) or (edge, k) in self._arrivals:
            return True
        transport = self._engine._transport
        assert transport is not None
        if edge.kind == "gradient":
            if (k, action.chunk) not in self._saved:
                return blocking
            specs = self._saved[k, action.chunk].specs
        else:
            key = (edge, self._shapes[k])
            if self._engine._dynamic or key not in self._known:
                if not blocking:
                    return False
                self._known[key] = transport.receive_specs(edge)
            specs = self._known[key]
            self._specs_in[edge, k] = specs
        if specs or edge.kind == "activation":
            self._arrivals[edge, k] = transport.receive(edge, specs)
        return True


def _tail(actions: Actions) -> Actions:
    """The W actions after the last action of another kind."""
    start = len(actions)
    while start and actions[start - 1].kind is Kind.W:
        start -= 1
    return actions[start:]


def _leaf_like(tensor: Tensor, trains: bool) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad and trains)


def _shapes_of(data: Any) -> tuple[Any, ...]:
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in tree_leaves(data) if isinstance(leaf, Tensor))
