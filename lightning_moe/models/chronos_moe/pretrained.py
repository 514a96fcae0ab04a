"""Saving and loading a trained model as one directory: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_moe.config import ChronosMoEConfig
from lightning_moe.config.mapping import from_mapping
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe.model import ChronosMoEModel
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.state import gather_full_state_dict, load_full_state_dict

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MODEL_TYPE = "chronos_moe"
"""Value of ``"model_type"`` in ``config.json``."""


def config_from_dict(values: Mapping[str, Any]) -> ChronosMoEConfig:
    """Rebuild a configuration from what :func:`dataclasses.asdict` made of it, also after JSON.

    Raises:
        ConfigError: An unknown field, or a value that is not allowed.
    """
    return from_mapping(ChronosMoEConfig, values, "config")


def save_model(model: ChronosMoEModel, directory: str | Path, mesh: ParallelMesh | None = None) -> None:
    """Write a model's configuration and whole weights.

    A collective call when the experts are spread over ranks.

    Args:
        model: The network.
        directory: Created if missing; rank 0 writes ``config.json`` and ``model.safetensors`` in it.
        mesh: Where the experts live; None for a model that is whole in this process.
    """
    mesh = mesh or ParallelMesh.single()
    state = gather_full_state_dict(model, mesh)
    if mesh.global_rank == 0:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / WEIGHTS_NAME)
        text = json.dumps({"model_type": MODEL_TYPE, **asdict(model.config)}, indent=2)
        (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    if torch.distributed.is_initialized() and mesh.world_size > 1:
        torch.distributed.barrier(mesh.group("world"))  # nobody may read the files before they are there


def load_config(directory: str | Path) -> ChronosMoEConfig:
    """Read the configuration of a saved model.

    Raises:
        ConfigError: The directory holds no Chronos-MoE configuration.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "directory", str(directory), f"a directory with a readable {CONFIG_NAME}", str(error)
        ) from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise ConfigError("directory", str(directory), f"a {CONFIG_NAME} with model_type {MODEL_TYPE!r}")
    return config_from_dict(values)


def load_weights(model: ChronosMoEModel, directory: str | Path) -> None:
    """Load the saved weights into a model of the same configuration; every rank keeps its own experts.

    Raises:
        ConfigError: The weights are missing, damaged, or those of another configuration.
    """
    path = Path(directory) / WEIGHTS_NAME
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            "directory", str(directory), f"a directory with a readable {WEIGHTS_NAME}", str(error)
        ) from error
    load_full_state_dict(model, state)
