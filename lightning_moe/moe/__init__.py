"""Mixture-of-Experts layers: router, dispatch to the ranks that hold the experts, experts, combine."""

from lightning_moe.moe.layer import MoELayer, RoutingInfo
from lightning_moe.moe.participation import number_layers, serve_until_idle
from lightning_moe.moe.router import TopKRouter

__all__ = ["MoELayer", "RoutingInfo", "TopKRouter", "number_layers", "serve_until_idle"]
