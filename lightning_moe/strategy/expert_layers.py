"""What a strategy does to the expert layers of a model."""

from __future__ import annotations

from torch import nn

from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.participation import number_layers
from lightning_moe.moe.router import TopKRouter
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh


def expert_layers(module: nn.Module) -> list[MoELayer]:
    """All expert layers, in the order that all ranks of an expert group have them in."""
    return [layer for layer in module.modules() if isinstance(layer, MoELayer)]


def spread_experts(module: nn.Module, mesh: ParallelMesh) -> None:
    """Let each expert layer keep this rank's experts, and tell it its number; harmless when called again."""
    layers = expert_layers(module)
    for layer in layers:
        layer.shard_(mesh)
    number_layers(layers)


def update_expert_biases(module: nn.Module, mesh: ParallelMesh) -> None:
    """Move the routers' biases by the load of their experts; a collective call."""
    for router in module.modules():
        if isinstance(router, TopKRouter):
            router.update_expert_bias(mesh.active_group(Axis.DATA_CONTEXT_TENSOR))
