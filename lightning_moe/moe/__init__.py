"""Mixture-of-Experts layers: router, dispatch to the ranks that hold the experts, experts, combine."""

from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.participation import number_layers, serve_until_idle
from lightning_moe.moe.router import TopKRouter
from lightning_moe.moe.routing_tape import RoutingTape, checkpoint_with_routing

__all__ = [
    "MoELayer",
    "RoutingInfo",
    "RoutingTape",
    "TopKRouter",
    "checkpoint_with_routing",
    "number_layers",
    "serve_until_idle",
]
