"""Two transformer blocks in the setting of FluidMoE: attention over ``context`` and experts on the same ranks.

Width 4,096, 32 heads, experts of inner width 14,336 with GELU and without a gate, two on each rank, of which a token
uses two; two sequences of 4,096 tokens, shared by all ranks. FluidMoE reports 1.28 times its own blocking version for
inference, 1.21 for forward and 1.13 for training, on two GPUs that its sources' comments make consumer ones without
direct access to each other. Its experts have a capacity; ours drop nothing. On CPUs the blocks are small, and show
that all ways compute the same, no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.bench.deterministic import deterministic
from lightning_moe.bench.moe_main_grads import MainGrads
from lightning_moe.bench.moe_rounds import PARTS, Contestant, Rounds, Series, differences, equality
from lightning_moe.config.gpt import GPTMoEConfig
from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.layers.rope import rope_frequencies, rope_tables_at
from lightning_moe.layers.token_layout import TokenLayout
from lightning_moe.models.gpt_moe.block import BlockInputs, GPTMoEBlock
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.overlap.rates import measure_rates
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sm_margin import sm_margin_for
from lightning_moe.weight_grad.queue import WeightGradQueue


@dataclass(frozen=True)
class FluidSize:
    """Sizes of the blocks and of their input.

    Attributes:
        hidden: Width of the tokens.
        heads: Attention heads.
        expert_hidden: Inner width of an expert.
        experts_per_rank: Experts on each rank.
        top_k: Experts that a token visits.
        sequence: Tokens of a sequence, over all ranks.
        batch: Sequences.
        blocks: Blocks.
    """

    hidden: int = 4096
    heads: int = 32
    expert_hidden: int = 14336
    experts_per_rank: int = 2
    top_k: int = 2
    sequence: int = 4096
    batch: int = 2
    blocks: int = 2


SMALL = FluidSize(hidden=128, heads=8, expert_hidden=448, sequence=256)
"""The same at a size for CPUs."""


@dataclass(frozen=True)
class _Way:
    """How blocks exchange tokens.

    Attributes:
        name: Name in the report.
        chunks: Parts that attention's heads are exchanged in.
        experts: How expert layers overlap; None for all-to-alls.
        waits: Whether attention waits for each part where it is sent.
        defers: Whether weight gradients are put off, to the waits of other layers.
    """

    name: str
    chunks: int
    experts: ExpertOverlap | None
    waits: bool = False
    defers: bool = False


def measure_fluid(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the blocks; called on every rank of an initialised world."""
    size = FluidSize() if device.type == "cuda" else SMALL
    mesh = ParallelMesh.build(ParallelConfig(context=options.ranks, expert=options.ranks))
    blocks = _Blocks(size, options, mesh, device)
    contestants = {way.name: blocks.contestant(way) for way in blocks.ways()}
    found = blocks.rounds.run(list(contestants.values()), warmup=options.warmup, steps=options.steps)
    with deterministic():
        errors, equal = _compare(blocks.rounds, contestants, device)
    baseline = found["blocking"]
    return {
        "shape": asdict(size),
        "attention_chunks": options.attention_chunks,
        "bitwise_equal": equal,
        "results": [
            {"name": name, "over_blocking": _ratios(baseline, series)} | series.summary() | errors.get(name, {})
            for name, series in found.items()
        ],
    }


def _compare(
    rounds: Rounds, contestants: Mapping[str, Contestant], device: torch.device
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Differences of all others from ``blocking``, and whether what does not wait equals ``waiting``.

    So must a second run of ``waiting``: if it does not, kernels are to blame, and the others say nothing.
    """
    expected, waited = (rounds.results(contestants[name]) for name in ("blocking", "waiting"))
    errors, equal = {}, {}
    for name, one in contestants.items():
        if name == "blocking":
            continue
        results = rounds.results(one)
        errors[name] = differences(results, expected, device)
        if one.name in _EQUAL:
            equal[name] = equality(results, waited, device)
    return errors, equal


_EQUAL = ("waiting", "overlap", "overlap, queue")
"""Ways that compute the same in the same chunks, whenever they wait."""


def _ratios(baseline: Series, series: Series) -> dict[str, float]:
    return {part: baseline.times(part).median / series.times(part).median for part in PARTS}


class _Blocks:
    """The blocks, with main gradients in float32 as under the strategy."""

    def __init__(self, size: FluidSize, options: argparse.Namespace, mesh: ParallelMesh, device: torch.device) -> None:
        self._options, self._device, rank = options, device, mesh.rank(Axis.CONTEXT)
        config = GPTMoEConfig(
            hidden_size=size.hidden,
            num_layers=size.blocks,
            num_heads=size.heads,
            max_sequence_length=size.sequence,
            moe=MoEConfig(
                num_experts=size.experts_per_rank * options.ranks,
                top_k=size.top_k,
                expert_hidden_size=size.expert_hidden,
                activation="gelu",
                load_balancing="none",
                auxiliary_loss_coefficient=0.0,
            ),
        )
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(GPTMoEBlock(config, layer, mesh, "none") for layer in range(size.blocks))
        self.blocks.to(device, options.dtype)
        length = size.sequence // options.ranks
        positions = torch.arange(rank * length, (rank + 1) * length, device=device)[None]
        frequencies, factor = rope_frequencies(config.head_width, config.rope_theta)
        rope = rope_tables_at(positions, frequencies, factor, options.dtype)
        self._inputs = BlockInputs(TokenLayout(size.batch, length, context_parallel=True), rope, None, None)
        generator = torch.Generator().manual_seed(1 + rank)
        hidden, grad = torch.randn((2, size.batch * length, size.hidden), generator=generator).to(device, options.dtype)
        self.rounds = Rounds(hidden, grad)
        self._queue = WeightGradQueue()
        self._main = MainGrads(self._deferrable(), self._queue)

    def ways(self) -> list[_Way]:
        """All-to-alls; overlap of either kind of layer; of both, waiting at once, not waiting, and with the queue."""
        options, chunks = self._options, self._options.attention_chunks
        layer = next(module for module in self.blocks.modules() if isinstance(module, MoELayer))
        group = layer.expert_group
        assert group is not None
        config = OverlapConfig(
            dispatch="p2p",
            chunk=options.chunk,
            expert_groups=options.expert_groups,
            save=options.save,
            sm_margin=options.sm_margin,
        )
        slots, up_width, hidden = layer.experts.projections[0].shape
        rates = measure_rates(
            group,
            self._device,
            hidden=hidden,
            up_width=up_width,
            inner=layer.experts.projections[1].shape[2],
            local_slots=slots,
            dtype=options.dtype,
            config=config,
        )
        overlap = ExpertOverlap(config, rates)
        return [
            _Way("blocking", 1, None),
            _Way("attention alone", chunks, None),
            _Way("experts alone", 1, overlap),
            _Way("waiting", chunks, ExpertOverlap(replace(config, wait_at_once=True), rates), waits=True),
            _Way("overlap", chunks, overlap),
            _Way("overlap, queue", chunks, ExpertOverlap(config, rates, self._queue), defers=True),
        ]

    def contestant(self, way: _Way) -> Contestant:
        """The blocks, exchanging tokens in one way."""

        def forward(hidden: Tensor) -> Tensor:
            margin = sm_margin_for(2, self._options.sm_margin)
            for block in self._each():
                block.attention.exchange_chunks, block.attention.wait_at_once = way.chunks, way.waits
                block.attention.sm_margin = margin
                assert isinstance(block.ffn, MoELayer)
                block.ffn.overlap = way.experts
            for block in self._each():
                hidden = block(hidden, self._inputs)[0]
            return hidden

        backward: Callable[[Tensor, Tensor], None] = self._deferred_backward if way.defers else _backward
        return Contestant(way.name, self.blocks, forward, backward, self._gradients, self._forget)

    def _each(self) -> list[GPTMoEBlock]:
        return [block for block in self.blocks if isinstance(block, GPTMoEBlock)]

    def _deferrable(self) -> dict[str, nn.Parameter]:
        """The weights of large products, whose gradients the strategy takes past autograd."""
        return {name: weight for name, weight in self.blocks.named_parameters() if "_proj" in name}

    def _deferred_backward(self, out: Tensor, grad: Tensor) -> None:
        with self._queue.capture(0):
            out.backward(grad)
        self._queue.pop(0)

    def _gradients(self) -> dict[str, Tensor]:
        others = {name: weight.grad for name, weight in self.blocks.named_parameters() if weight.grad is not None}
        return self._main.gradients() | others

    def _forget(self) -> None:
        self.blocks.zero_grad(set_to_none=True)
        self._main.forget()


def _backward(out: Tensor, grad: Tensor) -> None:
    out.backward(grad)
