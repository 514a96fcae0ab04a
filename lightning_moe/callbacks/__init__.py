"""Lightning callbacks for models with expert layers, and for models of text."""

from lightning_moe.callbacks.expert_load import ExpertLoad
from lightning_moe.callbacks.text_samples import TextSamples

__all__ = ["ExpertLoad", "TextSamples"]
