"""LightningModules: Chronos-MoE, and the baseline it is compared with."""
