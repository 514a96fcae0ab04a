"""Measurements: ``torchrun --nproc_per_node=N -m lightning_moe.bench.gpt``; nothing here is imported by the package."""
