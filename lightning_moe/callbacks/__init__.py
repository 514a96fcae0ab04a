"""Lightning callbacks for models with expert layers."""

from lightning_moe.callbacks.expert_load import ExpertLoad

__all__ = ["ExpertLoad"]
