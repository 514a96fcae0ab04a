"""Mixture-of-Experts layers: router, dispatch to the ranks that hold the experts, experts, combine.

Public names are loaded on first use, as those of the package are: what plans exchanges imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def _home_of(name: str) -> str | None:
    """Return the module that defines a public name."""
    match name:
        case "MoELayer" | "RoutingInfo":
            return "lightning_moe.moe.layer"
        case "number_layers" | "serve_until_idle":
            return "lightning_moe.moe.participation"
        case "TopKRouter":
            return "lightning_moe.moe.router"
        case "RoutingTape" | "checkpoint_with_routing":
            return "lightning_moe.moe.routing_tape"
        case _:
            return None


def __getattr__(name: str) -> object:
    home = _home_of(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
