"""One expert layer, run in every way that is compared: our exchanges, and Megatron-core's layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_moe.bench.moe_main_grads import MainGrads
from lightning_moe.bench.moe_rounds import Contestant, Rounds, differences, equality
from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.moe.activation import Activation
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.overlap.cost import LayerShape, Rates
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.overlap.plan import Chunking
from lightning_moe.moe.overlap.rates import measure_rates
from lightning_moe.moe.overlap.transport import SimulatedLink
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.weight_grad.queue import WeightGradQueue

CONTESTANTS = ("blocking", "p2p", "waiting", "auto", "megatron")
"""All-to-all; messages under computation; the same messages, each waited for where it is sent; whichever of the first
two was faster when both were tried; Megatron-core's layer."""


@dataclass(frozen=True)
class LayerSize:
    """Sizes of an expert layer and of its input.

    Attributes:
        name: Name in the report.
        hidden: Width of the tokens.
        expert_hidden: Inner width of an expert.
        experts: Number of experts on all ranks.
        top_k: Experts that a token visits.
        tokens: Tokens of each rank.
        activation: Nonlinearity of the experts.
    """

    name: str
    hidden: int
    expert_hidden: int
    experts: int
    top_k: int
    tokens: int
    activation: Activation = "swiglu"


SIZES: Mapping[str, LayerSize] = MappingProxyType(
    {
        size.name: size
        for size in (
            LayerSize("mixtral", 4096, 14336, 8, 2, 8192),
            LayerSize("olmoe", 2048, 1024, 64, 8, 16384),
            LayerSize("qwen3-30b", 2048, 768, 128, 8, 16384),
            LayerSize("small", 256, 512, 8, 2, 1024),
        )
    }
)
"""Shapes of published models, and one for CPUs."""


class Contest:
    """Contestants with the same weights and the same routing, and what they are measured on.

    Args:
        size: Sizes of the layer.
        options: The command line.
        mesh: All ranks along the axis ``expert``.
        device: Of this rank.
    """

    def __init__(self, size: LayerSize, options: argparse.Namespace, mesh: ParallelMesh, device: torch.device) -> None:
        self.size, self.options, self.device = size, options, device
        self.ranks = mesh.size(Axis.EXPERT)
        config = MoEConfig(
            num_experts=size.experts,
            top_k=size.top_k,
            expert_hidden_size=size.expert_hidden,
            activation=size.activation,
            router_pre_softmax=False,
            load_balancing="none",
            auxiliary_loss_coefficient=0.0,
        )
        self.layer = _layer(size.hidden, config, mesh, device, options.dtype)
        self.group = self.layer.expert_group
        self._main: MainGrads | None = None
        if options.main_grads:
            experts = {f"experts.{name}": weight for name, weight in self.layer.experts.named_parameters()}
            self._main = MainGrads(experts, WeightGradQueue())
        hidden, router = _tokens_and_router(size, options, mesh.rank(Axis.EXPERT))
        with torch.no_grad():
            self.layer.router.weight.copy_(router)
        hidden = hidden.to(device, options.dtype)
        grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1 + mesh.rank(Axis.EXPERT)))
        self.rounds = Rounds(hidden, grad.to(device, options.dtype))
        bytes_per_second = None if options.link_gigabytes is None else 1e9 * options.link_gigabytes
        self.link = None if bytes_per_second is None else SimulatedLink(bytes_per_second)
        self.shape = LayerShape(
            ranks=self.ranks,
            local_slots=size.experts // self.ranks,
            hidden=size.hidden,
            up_width=size.expert_hidden * (2 if size.activation == "swiglu" else 1),
            inner=size.expert_hidden,
            rows=size.tokens * size.top_k,
            itemsize=options.dtype.itemsize,
        )
        self.rates = self._measure_rates()
        self.overlaps = {name: self._overlap(name) for name in options.contestants if name not in ("megatron",)}

    def chunking(self, name: str) -> Chunking | None:
        """How a contestant of ours cuts its rows; None for an all-to-all."""
        overlap = self.overlaps.get(name)
        return None if overlap is None else overlap.choice.chunking(self.shape)

    def sm_margin(self, name: str) -> int | None:
        """Multiprocessors that a contestant's products leave to messages; None for an all-to-all."""
        overlap = self.overlaps.get(name)
        return None if overlap is None or self.chunking(name) is None else overlap.choice.sm_margin(self.ranks)

    def contestants(self) -> list[Contestant]:
        """Those of the command line."""
        return [
            self._megatron() if name == "megatron" else self._ours(name, self.overlaps[name])
            for name in self.options.contestants
        ]

    def overlapped(self, link: SimulatedLink | None) -> Contestant:
        """``p2p`` over a link of the caller's."""
        return self._ours("p2p", ExpertOverlap(self._config("p2p"), self.rates, link=link))

    def compare(self, contestants: Sequence[Contestant]) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """Compare outputs and gradients of one step.

        Returns:
            For each contestant but the first what :func:`differences` says of it and the first, and what
            :func:`equality` says of ``p2p`` and ``waiting``; None where one of them does not take part.
        """
        first, *others = contestants
        expected = self.rounds.results(first)
        found: dict[str, dict[str, Any]] = {}
        pair: dict[str, Tensor] | None = None  # results of whichever of the two comes first
        equal: dict[str, Any] | None = None
        for one in (first, *others):
            results = expected if one is first else self.rounds.results(one)
            if one is not first:
                found[one.name] = differences(results, expected, self.device)
            if one.name in ("p2p", "waiting"):
                if pair is not None:
                    equal = equality(results, pair, self.device)
                pair = results if pair is None else None
        return found, equal

    @torch.no_grad()
    def load(self) -> dict[str, float]:
        """Rows of the busiest expert and of the busiest rank, over the mean."""
        self.layer.eval()
        counts = self.layer(self.rounds.hidden)[1].tokens_per_expert.clone()
        if self.group is not None:
            torch.distributed.all_reduce(counts, group=self.group)
        by_rank = counts.view(self.ranks, -1).sum(1)
        return {
            "busiest_expert": float(counts.max() / counts.double().mean()),
            "busiest_rank": float(by_rank.max() / by_rank.double().mean()),
        }

    def _ours(self, name: str, overlap: ExpertOverlap | None) -> Contestant:
        layer, main = self.layer, self._main

        def forward(hidden: Tensor) -> Tensor:
            layer.overlap = overlap
            out: Tensor = layer(hidden)[0]
            return out

        def gradients() -> dict[str, Tensor]:
            found = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
            return found if main is None else found | main.gradients()

        def forget() -> None:
            layer.zero_grad(set_to_none=True)
            if main is not None:
                main.forget()

        return Contestant(name, layer, forward, _backward, gradients, forget)

    def _megatron(self) -> Contestant:
        from lightning_moe.bench.moe_peer import MegatronPeer

        peer = MegatronPeer(self.layer, self.size, main_grads=self.options.main_grads)
        return Contestant("megatron", peer.layer, peer.forward, peer.backward, peer.gradients, peer.forget)

    def _overlap(self, name: str) -> ExpertOverlap | None:
        if name == "blocking" or self.group is None:
            return None
        dispatch = "auto" if name == "auto" else "p2p"
        # All-to-alls do not cross the simulated link, so there is nothing to learn from trying them.
        trials: dict[LayerShape, tuple[float, float]] | None = {} if self.link is None else None
        config = self._config(dispatch, wait_at_once=name == "waiting")
        return ExpertOverlap(config, self.rates, link=self.link, trials=trials)

    def _config(self, dispatch: Any, *, wait_at_once: bool = False) -> OverlapConfig:
        options = self.options
        return OverlapConfig(
            dispatch=dispatch,
            chunk=options.chunk,
            expert_groups=options.expert_groups,
            save=options.save,
            sm_margin=options.sm_margin,
            link_gigabytes_per_second=options.link_gigabytes,
            wait_at_once=wait_at_once,
        )

    def _measure_rates(self) -> Rates | None:
        if self.group is None:
            return None
        shape = self.shape
        return measure_rates(
            self.group,
            self.device,
            hidden=shape.hidden,
            up_width=shape.up_width,
            inner=shape.inner,
            local_slots=shape.local_slots,
            dtype=self.options.dtype,
            config=self._config("p2p"),
        )


def _layer(hidden: int, config: MoEConfig, mesh: ParallelMesh, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """A layer whose experts are drawn on the device: on the host the large ones take a quarter of a minute."""
    with torch.device("meta"):
        layer = MoELayer(hidden, config, mesh)
    slots = layer.slots_of_expert
    layer.to(dtype).to_empty(device=device)
    layer.slots_of_expert = slots.to(device)
    generator = torch.Generator(device).manual_seed(mesh.rank(Axis.EXPERT))
    with torch.no_grad():
        for weight in layer.experts.projections:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return layer


def _backward(out: Tensor, grad: Tensor) -> None:
    out.backward(grad)


def _tokens_and_router(size: LayerSize, options: argparse.Namespace, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's tokens, float32 ``[T, D]``, and the router's weight ``[E, D]``, which make the routing.

    Every contestant routes by itself, so the routing has to be in the tokens: for a skewed one a constant feature gives
    each expert a popularity of its own, and for a balanced one the first features name the experts in turn.
    """
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(100 + rank)
    router = torch.randn((size.experts, size.hidden), generator=common) * size.hidden**-0.5
    hidden = torch.randn((size.tokens, size.hidden), generator=own)
    if options.balanced:
        token = torch.arange(size.tokens)[:, None] * size.top_k
        chosen = (token + torch.arange(size.top_k)).remainder(size.experts)
        hidden[:, : size.experts] = torch.zeros((size.tokens, size.experts)).scatter_(1, chosen, _CERTAIN)
        router[:, : size.experts] = _CERTAIN * torch.eye(size.experts)
    elif options.skew:
        hidden[:, 0] = 1.0
        router[:, 0] = options.skew * torch.randn(size.experts, generator=common)
    return hidden, router


_CERTAIN = 4.0
"""Its square is added to the logits of the experts that a token is to visit; without it they have a deviation of 1."""
