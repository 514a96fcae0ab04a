"""Arguments of Lightning's ``Trainer``, for checking recipes without importing it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from lightning_moe.config.ranges import Rule, at_least
from lightning_moe.config.reader import Component
from lightning_moe.config.strategy import StrategyRecipe
from lightning_moe.errors import ConfigError

StrategyName = Literal[
    "auto",
    "moe",
    "moe_spawn",
    "moe_fork",
    "ddp",
    "ddp_spawn",
    "ddp_fork",
    "ddp_notebook",
    "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true",
    "ddp_spawn_find_unused_parameters_false",
    "ddp_spawn_find_unused_parameters_true",
    "ddp_fork_find_unused_parameters_false",
    "ddp_fork_find_unused_parameters_true",
    "ddp_notebook_find_unused_parameters_false",
    "ddp_notebook_find_unused_parameters_true",
    "deepspeed",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
    "deepspeed_stage_3_offload_nvme",
    "fsdp",
    "fsdp_cpu_offload",
    "single_device",
    "single_tpu",
    "single_xla",
    "xla",
    "xla_debug",
]

Precision = Literal[
    64,
    32,
    16,
    "64",
    "32",
    "16",
    "bf16",
    "64-true",
    "32-true",
    "16-true",
    "bf16-true",
    "16-mixed",
    "bf16-mixed",
    "transformer-engine",
    "transformer-engine-float16",
]


class StrategyComponent(Component):
    """A strategy by its class."""

    known: ClassVar = MappingProxyType({"MoEStrategy": StrategyRecipe})


def max_steps_is_positive(config: TrainerRecipe) -> ConfigError | None:
    """A run has at least one step, or -1 for no limit."""
    if config.max_steps == -1 or config.max_steps > 0:
        return None
    return ConfigError("max_steps", config.max_steps, "at least 1, or -1 for no limit", "0 would train nothing")


def devices_are_countable(config: TrainerRecipe) -> ConfigError | None:
    """Devices are a number, a list of indices, or left to Lightning."""
    devices = config.devices
    if isinstance(devices, str):
        if devices == "auto" or all(part.strip().lstrip("-").isdigit() for part in devices.split(",")):
            return None
    elif isinstance(devices, list):
        if devices and len(set(devices)) == len(devices):
            return None
    elif devices == -1 or devices > 0:
        return None
    return ConfigError(
        "devices",
        devices,
        "a number of at least 1, -1 for all, auto, or a list of distinct indices",
        "try auto",
    )


def cpu_devices_are_a_number(config: TrainerRecipe) -> ConfigError | None:
    """On CPU, devices are processes: they have no indices, and there is no "all of them"."""
    devices = config.devices
    if config.accelerator != "cpu" or devices == "auto":
        return None
    if isinstance(devices, int | str) and str(devices).isdigit():
        return None
    return ConfigError("devices", devices, "a number of at least 1 on CPU", "it is the number of processes")


def limits_are_counts_or_fractions(config: TrainerRecipe) -> ConfigError | None:
    """A limit is a number of batches, or a fraction of all."""
    for field in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        value = getattr(config, field)
        if value is not None and (value < 0 or (isinstance(value, float) and value > 1.0)):
            return ConfigError(
                field,
                value,
                "a number of batches, or a fraction between 0.0 and 1.0",
                "an integer counts batches",
            )
    return None


@dataclass(frozen=True, kw_only=True)
class TrainerRecipe:
    """What a recipe may give under ``trainer``: the arguments of ``lightning.pytorch.Trainer``."""

    rules: ClassVar[tuple[Rule, ...]] = (
        devices_are_countable,
        cpu_devices_are_a_number,
        at_least("num_nodes", 1),
        at_least("max_epochs", -1, "-1 means no limit"),
        max_steps_is_positive,
        at_least("accumulate_grad_batches", 1),
        at_least("gradient_clip_val", 0.0, "0 turns clipping off"),
        at_least("log_every_n_steps", 0),
        at_least("check_val_every_n_epoch", 1),
        limits_are_counts_or_fractions,
    )

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    strategy: StrategyName | StrategyComponent = "auto"
    devices: list[int] | str | int = "auto"
    num_nodes: int = 1
    precision: Precision | None = None
    logger: bool | Component | list[Component] | None = None
    callbacks: list[Component] | Component | None = None
    fast_dev_run: int | bool = False
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: str | dict[str, int] | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    val_check_interval: int | float | str | dict[str, int] | None = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int | None = None
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: int | float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    profiler: Literal["simple", "advanced", "pytorch", "xla"] | Component | None = None
    detect_anomaly: bool = False
    barebones: bool = False
    plugins: Component | list[Component] | Any = None
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    default_root_dir: str | None = None
    enable_autolog_hparams: bool = True
    model_registry: str | None = None


def full_precision_name(precision: str | int | None) -> str:
    """Return Lightning's full name of a precision, e.g. ``"16-mixed"`` for its older spelling ``16``."""
    name = "32-true" if precision is None else str(precision)
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(name, name)


def count_devices(trainer: TrainerRecipe) -> int | None:
    """Return the number of processes per node, or None when only the machine that runs it knows."""
    devices: Any = trainer.devices
    if isinstance(devices, str):
        if devices == "auto":
            return 1 if trainer.accelerator == "cpu" else None
        devices = [int(part) for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
    if isinstance(devices, list):
        return len(devices)
    return devices if devices > 0 else None
