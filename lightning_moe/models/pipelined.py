"""Networks that are whole in one process or cut into parts, and what modules do alike with both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import nn

from lightning_moe.errors import ConfigError
from lightning_moe.models.ranks import pipeline_of
from lightning_moe.models.tasks import Task
from lightning_moe.parallel.state import load_full_state_dict
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput, ScheduleResult

if TYPE_CHECKING:
    import lightning.pytorch as pl

Layer = TypeVar("Layer", bound=nn.Module)
Network = TypeVar("Network", bound=nn.Module)


class WholeNetwork(Protocol):
    """A network that runs a batch in one piece."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""
        ...

    def run_whole(self, microbatch: Microbatch) -> PartOutput:
        """Run all of the network; ``microbatch.context`` is a :data:`~lightning_moe.models.tasks.Task`."""
        ...


def run_step(
    module: pl.LightningModule, network: WholeNetwork, batch: object, task: Task, *, outputs: bool = False
) -> ScheduleResult:
    """Run a batch through a network: by a schedule where the strategy has pipelines, in one piece elsewhere.

    Args:
        module: The module of the step.
        network: Its network.
        batch: The batch.
        task: What is wanted.
        outputs: Whether predictions are wanted.

    Returns:
        The result, its loss in the dtype of the weights, float32 at least. Stages add it up in float64: rounding the
        sum gives all pipelines the same number.
    """
    runner = pipeline_of(module)
    if runner is not None:
        result = runner.run_schedule(batch, task, outputs=outputs)
    else:
        out = network.run_whole(Microbatch(batch, context=task))
        loss = torch.zeros(()) if out.loss is None else out.loss
        result = ScheduleResult(loss, dict(out.metrics), [out.output])
    return replace(result, loss=result.loss.to(torch.promote_types(network.dtype, torch.float32)))


def take_over(network: Network, before: nn.Module | None) -> Network:
    """Give a new network the weights of the one that it replaces, of which it may hold a part; itself returned.

    Args:
        network: The new one.
        before: The old one, which was whole in this process or on the ranks of the new one; None for none.

    Raises:
        ConfigError: The new one holds what the old one does not.
    """
    if before is None:
        return network
    reference = next(before.parameters())
    network.to(reference.device, reference.dtype)
    state, own = before.state_dict(), network.state_dict()
    load_full_state_dict(network, {name: value for name, value in state.items() if name in own})
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(before.get_parameter(name).requires_grad)
    return network


def held(build: Callable[[], Layer], wanted: bool) -> Layer | None:
    """Build a layer, or, if it is not wanted, only draw the random numbers that its initial weights take.

    What is built afterwards then starts from the weights that it has in a whole model. For layers that draw all of
    their numbers from the default CPU generator, wherever they are built.
    """
    if wanted:
        return build()
    with torch.device("meta"):
        build()
    return None


class NetworkInParts(nn.Module):
    """A network that holds all of its blocks, or parts of a pipeline, and runs both by the same code.

    Args:
        num_blocks: Number of blocks of the whole network.
        parts: The parts that are held, in the order of the rank's chunks; None for all, without a pipeline.

    Attributes:
        parts: Likewise.
        own_parts: The parts, or the one that is the whole network.
    """

    def __init__(self, num_blocks: int, parts: Sequence[ModelPart] | None) -> None:
        super().__init__()
        self._whole = ModelPart.whole(num_blocks)
        self.parts = None if parts is None else tuple(parts)
        self.own_parts = (self._whole,) if self.parts is None else self.parts

    def run_part(self, part: int, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Run one of ``parts``; see :class:`~lightning_moe.pipeline.spec.PipelinedModel`.

        The microbatch has the batch of the LightningModule as data, and a :data:`~lightning_moe.models.tasks.Task` as
        context.
        """
        assert self.parts is not None, "not built for a pipeline"
        return self._run(self.parts[part], carry, microbatch)

    def run_whole(self, microbatch: Microbatch) -> PartOutput:
        """Run all of the network as :meth:`run_part` runs a part.

        Raises:
            ConfigError: Only a part of the network is held.
        """
        return self._run(self.whole(), (), microbatch)

    def whole(self) -> ModelPart:
        """The part that is the whole network.

        Raises:
            ConfigError: Only a part of it is held.
        """
        held_blocks = {block for part in self.own_parts for block in part.blocks}
        first, last = any(part.first for part in self.own_parts), any(part.last for part in self.own_parts)
        if len(held_blocks) < len(self._whole.blocks) or not first or not last:
            raise ConfigError(
                "model",
                f"{len(held_blocks)} of {len(self._whole.blocks)} blocks",
                "a whole model, or a Trainer with the pipeline that this part was built for",
                "save a checkpoint and load it where the whole model is wanted",
            )
        return self._whole

    @abstractmethod
    def _run(self, part: ModelPart, carry: Carry, microbatch: Microbatch) -> PartOutput:
        """Run a part that is held."""
        ...
