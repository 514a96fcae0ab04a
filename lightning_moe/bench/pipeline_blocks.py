"""The blocks that the pipeline benchmark runs, and where their weight gradients go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_moe.bench.sinks import QueueingSink
from lightning_moe.layers import Linear
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput
from lightning_moe.weight_grad import WeightGrad, attach_sink, deliver, sink_of
from lightning_moe.weight_grad.queue import WeightGradQueue


class TransformerBlock(nn.Module):
    """Dense pre-norm block with causal attention and SwiGLU of inner width 4 D.

    Args:
        width: Width ``D``.
        heads: Number of heads.
        ours: Whether the linear layers are ours, or torch's.
    """

    def __init__(self, width: int, heads: int, *, ours: bool) -> None:
        super().__init__()
        kind = Linear if ours else nn.Linear
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = kind(width, 3 * width, bias=False), kind(width, width, bias=False)
        self.gate_up, self.down = kind(width, 8 * width, bias=False), kind(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, S, D]`` to the same."""
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.ffn_norm(hidden)).chunk(2, -1)
        hidden = hidden + self.down(F.silu(gate) * up)
        return hidden


class Sleep(nn.Module):
    """A block that computes nothing and takes the given seconds for F, B and W."""

    def __init__(self, forward: float, backward: float, weight: float) -> None:
        super().__init__()
        self.seconds = forward, backward, weight
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """The input."""
        out: Tensor = _Sleep.apply(hidden, self.weight, *self.seconds)  # type: ignore[no-untyped-call]
        return out


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, forward: float, backward: float, later: float) -> Tensor:
        ctx.sink, ctx.backward_seconds, ctx.later = sink_of(weight), backward, later
        time.sleep(forward)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.backward_seconds)
        return grad, deliver(SleepGrad(ctx.later), ctx.sink, grad.dtype), None, None, None


@dataclass(frozen=True)
class SleepGrad(WeightGrad):
    """A weight gradient that takes ``seconds``, and is zero."""

    seconds: float

    def compute(self) -> Tensor:
        """Zero, after a while."""
        time.sleep(self.seconds)
        return torch.zeros(())

    def add_to(self, main_grad: Tensor, *, accumulate: bool) -> None:
        """Take the time."""
        time.sleep(self.seconds)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """None."""
        return ()

    @property
    def flops(self) -> float:
        """None."""
        return 0.0


class _GradSink(QueueingSink):
    """Accumulates into ``weight.grad``, in the dtype of the weight, as autograd would."""

    def __init__(self, weight: nn.Parameter, queue: WeightGradQueue) -> None:
        super().__init__(queue)
        self._weight = weight

    @override
    def add(self, grad: WeightGrad) -> None:
        """Add the gradient."""
        if self._weight.grad is None:
            self._weight.grad = grad.compute()
        else:
            grad.add_to(self._weight.grad, accumulate=True)


def weight_sinks(module: nn.Module, queue: WeightGradQueue) -> None:
    """Let our layers' weight gradients go to the queue, and from there to ``weight.grad``."""
    for layer in module.modules():
        if isinstance(layer, Linear | Sleep):
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            attach_sink(weight, _GradSink(weight, queue))


class BlockParts(nn.Module):
    """Parts made of blocks only: the first takes the microbatch's input, the last computes a loss.

    Args:
        parts: The parts.
        blocks: The blocks of each.
    """

    def __init__(self, parts: Sequence[ModelPart], blocks: Sequence[nn.ModuleList]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.blocks = nn.ModuleList(blocks)

    def run_part(self, part: int, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Run a part; see :class:`~lightning_moe.pipeline.spec.PipelinedModel`."""
        hidden = microbatch.data[0] if self.parts[part].first else carry[0]
        blocks = self.blocks[part]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            hidden = block(hidden)
        if self.parts[part].last:
            return PartOutput(loss=mean_product(hidden, microbatch.data[1]))
        return PartOutput((hidden,))


def mean_product(hidden: Tensor, target: Tensor) -> Tensor:
    """A cheap loss whose gradient is the target."""
    return (hidden.float() * target).mean()
