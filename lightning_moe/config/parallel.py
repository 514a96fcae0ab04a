"""Sizes of the parallel axes and the rules that tie them to the world size (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from lightning_moe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ways each axis of the training run is split.

    ``sequence_parallel`` has an effect with ``tensor`` > 1 only: activations between the layers whose weights are
    split are then split by tokens (Korthikanti et al. 2022, arXiv:2205.05198) instead of being kept whole on each rank.

    The dense axes factor the world: ``pipeline * data * context * tensor == world_size``. The expert axes
    fold the same ranks a second way: ``expert_data * expert * expert_tensor == data * context * tensor``.
    """

    pipeline: int = 1
    """Number of pipeline stages, each holding a part of the layers."""
    data: int | None = None
    """Number of ranks that see different samples with the same dense weights; derived when left out."""
    context: int = 1
    """Number of ranks that share one sequence."""
    tensor: int = 1
    """Number of ranks that share one dense weight matrix."""
    expert: int = 1
    """Number of ranks that the experts of a layer are spread over."""
    expert_tensor: int = 1
    """Number of ranks that share the weight matrices of one expert."""
    sequence_parallel: bool = True
    """Whether tensor ranks share the tokens too, outside of attention and feed-forward layers."""

    def __post_init__(self) -> None:
        if not isinstance(self.sequence_parallel, bool):
            raise ConfigError("parallel.sequence_parallel", self.sequence_parallel, "true or false")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "sequence_parallel":
                continue
            if field.name == "data" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"parallel.{field.name}", value, "an integer of at least 1")

    @property
    def model_size(self) -> int:
        """Number of ranks that hold one copy of the dense weights (pipeline x context x tensor)."""
        return self.pipeline * self.context * self.tensor

    @property
    def expert_data(self) -> int:
        """Number of ranks that hold the same experts; needs ``data`` to be known (see :meth:`resolve`)."""
        assert self.data is not None, "resolve(world_size) first"
        return self.data * self.context * self.tensor // (self.expert * self.expert_tensor)

    def resolve(self, world_size: int) -> ParallelConfig:
        """Return this configuration with ``data`` filled in for a world of ``world_size`` ranks.

        Raises:
            ConfigError: The sizes do not factor the world, or the expert axes do not fold into the dense ones.
        """
        if world_size % self.model_size:
            raise ConfigError(
                "parallel.pipeline*context*tensor",
                self.model_size,
                f"a divisor of the world size {world_size} (num_nodes x devices)",
                f"run on a multiple of {self.model_size} ranks, or make these axes smaller",
            )
        data = world_size // self.model_size
        if self.data is not None and self.data != data:
            raise ConfigError(
                "parallel.data",
                self.data,
                f"{data} (world size {world_size} / (pipeline x context x tensor = {self.model_size}))",
                "leave it out and it is derived",
            )
        stage_size = data * self.context * self.tensor
        if stage_size % (self.expert * self.expert_tensor):
            name, value = "parallel.expert", self.expert
            if self.expert == 1:
                name, value = "parallel.expert_tensor", self.expert_tensor
            raise ConfigError(
                name,
                value,
                f"expert x expert_tensor must divide data x context x tensor = {stage_size}",
                f"expert x expert_tensor is {self.expert * self.expert_tensor}; "
                f"run on more ranks (trainer.devices) or spread the experts over fewer",
            )
        return replace(self, data=data)
