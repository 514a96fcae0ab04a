"""Tells expert and attention layers how to overlap their exchanges with computation.

[Note: why overlap has to be asked for]
Without an :class:`~lightning_moe.config.OverlapConfig` layers exchange tokens by all-to-alls that are waited for.
Chunks multiply in smaller pieces and scale rows before the second projection instead of after it, so results differ in
the last bits from those of an all-to-all. What ``auto`` chooses rests on times that are measured anew in each run, so
they would differ from run to run, too, and a resumed run would not repeat the bits of one that has not stopped. What is
promised bit for bit (any pipeline schedule, exact resumption) must not depend on a stopwatch unless it is asked to.

With an ``OverlapConfig`` the same bits come out again if nothing is left to a measurement: with ``dispatch: p2p`` and
``chunk: source``, or ``chunk: expert`` with ``expert_groups``; or with ``link_gigabytes_per_second`` and
``gemm_teraflops`` given, from which every run chooses alike. When weight gradients are computed, in waits or later,
changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.errors import ConfigError
from lightning_moe.layers.causal_attention import CausalSelfAttention
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.overlap.cost import LayerShape, Rates, typical_gemm
from lightning_moe.moe.overlap.executor import ExpertOverlap
from lightning_moe.moe.overlap.rates import measure_rates
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sm_margin import sm_margin_for
from lightning_moe.weight_grad import compute_dtype
from lightning_moe.weight_grad.queue import WeightGradQueue

_FAST_LINK = 100e9
"""Bytes per second: NVLink is several times faster, host memory and networks are slower."""


class _Products(NamedTuple):
    """What the rates of an expert layer depend on; see :func:`measure_rates`."""

    local_slots: int
    hidden: int
    up_width: int
    inner: int
    dtype: torch.dtype


class LayerOverlap:
    """Gives the layers of a model what they overlap by.

    Args:
        config: What the user wants; None for all-to-alls that are waited for.
    """

    def __init__(self, config: OverlapConfig | None) -> None:
        self._config = config
        self._mesh: ParallelMesh | None = None
        self._rates: dict[_Products, Rates] = {}
        self._trials: dict[_Products, dict[LayerShape, tuple[float, float]]] = {}

    def set_up(
        self,
        module: nn.Module,
        mesh: ParallelMesh,
        queue: WeightGradQueue | None,
        forward_context: Callable[[], AbstractContextManager[None]],
    ) -> bool:
        """Prepare all expert and attention layers; a collective call of the ranks that share experts.

        Where something depends on rates that are not given, they are measured, once for each kind of layer, and kept
        for later calls on the same mesh, as is what was tried in training: a model is evaluated by the chunks that it
        was trained by.

        Args:
            module: The module, built and on its device.
            mesh: The parallel mesh.
            queue: Deferred weight gradients, to be computed in waits; None where there are none.
            forward_context: Makes the context that the model runs in, e.g. autocast.

        Returns:
            Whether there are layers that take weight gradients from the queue.

        Raises:
            ConfigError: The experts of a rank cannot be divided as is wanted.
        """
        if mesh is not self._mesh:
            self._mesh, self._rates, self._trials = mesh, {}, {}
        overlaps: dict[_Products, ExpertOverlap] = {}
        for layer in module.modules():
            if isinstance(layer, MoELayer):
                layer.overlap = None  # another strategy may have set it
                if self._config is not None and self._config.dispatch != "blocking" and layer.expert_group is not None:
                    with forward_context():
                        products = _products_of(layer)
                    if products not in overlaps:
                        overlaps[products] = self._make(self._config, layer, products, queue)
                    layer.overlap = overlaps[products]
        rates = [overlap.rates for overlap in overlaps.values() if overlap.rates is not None]
        for layer in module.modules():
            if isinstance(layer, CausalSelfAttention):
                layer.exchange_chunks = _exchange_chunks(self._config, rates)
                layer.wait_at_once = self._config is not None and self._config.wait_at_once
                layer.sm_margin = _attention_margin(self._config)
        return queue is not None and bool(overlaps)

    def _make(
        self, config: OverlapConfig, layer: MoELayer, products: _Products, queue: WeightGradQueue | None
    ) -> ExpertOverlap:
        if config.expert_groups is not None and config.expert_groups > products.local_slots:
            raise ConfigError(
                "overlap.expert_groups",
                config.expert_groups,
                f"at most {products.local_slots}, the experts of a rank",
                "leave it out to ask the cost model",
            )
        rates = self._rates_for(config, layer, products, queue is not None)
        trials = self._trials.setdefault(products, {}) if _given_rates(config) is None else None
        return ExpertOverlap(config, rates, queue, trials=trials, report=rank_zero_info)

    def _rates_for(self, config: OverlapConfig, layer: MoELayer, products: _Products, has_queue: bool) -> Rates | None:
        """Rates of a layer's exchange and products; None where nothing depends on them."""
        chooses = config.dispatch == "auto" or config.chunk == "auto"
        chooses = chooses or (config.chunk == "expert" and config.expert_groups is None)
        if not chooses and not has_queue:  # a queue is told how long a wait will be
            return None
        given = _given_rates(config)
        if given is not None:
            return given
        if products not in self._rates:
            group = layer.expert_group
            assert group is not None
            self._rates[products] = rates = measure_rates(
                group, layer.router.weight.device, **products._asdict(), config=config
            )
            rank_zero_info(_report(rates, products))
        return self._rates[products]


def _products_of(layer: MoELayer) -> _Products:
    up, down = layer.experts.projections
    # Stacked in torch.nn.Linear's orientation: [slots, U, D] and [slots, D, F].
    return _Products(up.shape[0], up.shape[2], up.shape[1], down.shape[2], compute_dtype(up))


def _exchange_chunks(config: OverlapConfig | None, rates: Sequence[Rates]) -> int:
    """Chunks of heads; a layer makes as many of them as it can, and none where there is nobody to exchange with."""
    if config is None:
        return 1
    if config.attention_chunks is not None:
        return config.attention_chunks
    if config.dispatch == "auto":  # on a fast link the chunks' own work is more than what they hide
        return 2 if any(rate.link_bytes_per_second < _FAST_LINK for rate in rates) else 1
    return 1 if config.dispatch == "blocking" else 2


def _attention_margin(config: OverlapConfig | None) -> int:
    if config is None:
        return 0
    # More for more ranks has been measured in expert layers alone; over fast links, where NCCL holds more
    # multiprocessors, ``auto`` does not cut heads.
    return sm_margin_for(2, config.sm_margin)


def _given_rates(config: OverlapConfig) -> Rates | None:
    """Rates that follow from the config alone, in every run the same; None if one has to be measured."""
    link, gemm = config.link_gigabytes_per_second, config.gemm_teraflops
    if link is None or gemm is None:
        return None
    return Rates(link_bytes_per_second=link * 1e9, gemm=typical_gemm(gemm * 1e12))


def _report(rates: Rates, products: _Products) -> str:
    """What a user may want to write into a recipe."""
    link, gemm = rates.link_bytes_per_second / 1e9, rates.flops_per_second(float("inf")) / 1e12
    return (
        f"overlap: experts of width {products.hidden} x {products.inner} compute at {gemm:.3g} TFLOP/s, and a rank "
        f"sends {link:.3g} GB/s; overlap.gemm_teraflops and overlap.link_gigabytes_per_second fix them for later runs"
    )
