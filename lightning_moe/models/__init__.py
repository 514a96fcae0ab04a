"""LightningModules: Chronos-MoE, GPT-MoE, and the baseline that forecasts are compared with."""
