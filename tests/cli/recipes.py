"""A recipe that uses every part of the schema, for tests to break."""

from __future__ import annotations

GOOD = """\
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 2
  num_nodes: 1
  precision: 32-true
  max_steps: 2000
  gradient_clip_val: 1.0
  log_every_n_steps: 50
  strategy:
    class_path: lightning_moe.MoEStrategy
    init_args:
      parallel:
        expert: 2
      start_method: popen
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: runs
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        monitor: val_wql
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
model:
  class_path: lightning_moe.ChronosMoE
  init_args:
    config:
      hidden_size: 64
      num_heads: 2
      context_length: 144
      prediction_length: 24
      patch_length: 12
      quantiles: [0.1, 0.5, 0.9]
      moe:
        num_experts: 8
        top_k: 2
        activation: relu
        shared_expert_hidden_size: 128
        shared_expert_gate: true
    optimizer:
      learning_rate: 2e-3
      warmup_steps: 100
data:
  class_path: lightning_moe.SeriesDataModule
  init_args:
    context_length: 144
    prediction_length: 24
    batch_size: 96
"""


def edited(old: str, new: str) -> str:
    """Return the recipe with one passage replaced; a passage that is not there once is a mistake in the test."""
    assert GOOD.count(old) == 1, f"{old!r} occurs {GOOD.count(old)} times"
    return GOOD.replace(old, new)
