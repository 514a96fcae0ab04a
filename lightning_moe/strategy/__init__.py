"""``MoEStrategy`` for the Lightning Trainer; importing it registers ``"moe"``, ``"moe_spawn"`` and ``"moe_fork"``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_moe.strategy.strategy import MoEStrategy

if "moe" not in StrategyRegistry:
    MoEStrategy.register_strategies(StrategyRegistry)

__all__ = ["MoEStrategy"]
