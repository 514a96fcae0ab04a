"""Lightning's model summaries, of a model that is spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.model_summary.model_summary import UNKNOWN_SIZE
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Summary
from torch import nn
from typing_extensions import override

from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import sharded_parameters, whole_shape
from lightning_moe.parallel.stages import gather_stages


class ShardedModelSummary(callbacks.ModelSummary):
    """``ModelSummary`` of the whole model: the layers of all pipeline stages, and all of what is split over ranks.

    :class:`~lightning_moe.MoEStrategy` puts it in the place of Lightning's own, with the same arguments. Sizes of
    inputs and outputs, and FLOPs, are those that rank 0 has; layers of a pipeline have none, as no rank can run them
    all on the ``example_input_array``.
    """

    @override
    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Summary:
        return WholeSummary(pl_module, trainer.strategy.mesh, self._max_depth)  # type: ignore[attr-defined]


class ShardedRichModelSummary(callbacks.RichModelSummary):
    """``RichModelSummary`` of the whole model; see :class:`ShardedModelSummary`."""

    @override
    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Summary:
        return WholeSummary(pl_module, trainer.strategy.mesh, self._max_depth)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Layers:
    """What one stage knows.

    Attributes:
        layers: Type, and whether in training mode, of every module by name, in order.
        parameters: Elements of the whole tensor, and whether it is trained, of every parameter by name.
        aliases: The name in ``parameters`` for every name of a parameter; several modules may share one.
    """

    layers: dict[str, tuple[str, bool]]
    parameters: dict[str, tuple[int, bool]]
    aliases: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> _Layers:
        names = {parameter: name for name, parameter in module.named_parameters()}
        return cls(
            {name: (type(layer).__name__, layer.training) for name, layer in module.named_modules() if name},
            {
                name: (prod(whole_shape(parameter, specs)), parameter.requires_grad)
                for name, parameter, specs in sharded_parameters(module)
            },
            {name: names[parameter] for name, parameter in module.named_parameters(remove_duplicate=False)},
        )

    @classmethod
    def merge(cls, stages: Sequence[_Layers]) -> _Layers:
        """The whole model; what several stages have counts once, as the first of them has it."""
        whole = cls({}, {}, {})
        for stage in reversed(stages):
            whole.layers.update(stage.layers)
            whole.parameters.update(stage.parameters)
            whole.aliases.update(stage.aliases)
        ordered = in_model_order([list(stage.layers) for stage in stages])
        return cls({name: whole.layers[name] for name in ordered}, whole.parameters, whole.aliases)

    def count(self, prefix: str) -> int:
        """Number of elements of the parameters under a layer."""
        held = {whole for name, whole in self.aliases.items() if name.startswith(f"{prefix}.")}
        return sum(self.parameters[name][0] for name in held)


@dataclass(frozen=True)
class _Row:
    """A layer of the whole model, with what Lightning's summary asks of one."""

    layer_type: str
    num_parameters: int
    training: bool
    in_size: str | list[Any] = UNKNOWN_SIZE
    out_size: str | list[Any] = UNKNOWN_SIZE


class WholeSummary(Summary):
    """Lightning's summary of all layers of a model; a collective call of the ranks of a pipeline.

    Args:
        model: The module with this rank's part of the model.
        mesh: The parallel mesh.
        max_depth: As in Lightning.
    """

    def __init__(self, model: pl.LightningModule, mesh: ParallelMesh, max_depth: int = 1) -> None:
        self._mesh = mesh
        self._whole = _Layers.merge(gather_stages(_Layers.of(model), mesh))
        super().__init__(model, max_depth)

    @override
    def summarize(self) -> dict[str, Any]:
        own: Mapping[str, Any] = super().summarize()
        rows = {}
        for name, (kind, training) in self._whole.layers.items():
            if self._max_depth >= 0 and name.count(".") >= self._max_depth:
                continue
            sizes = (own[name].in_size, own[name].out_size) if name in own else ()
            rows[name] = _Row(kind, self._whole.count(name), training, *sizes)
        return rows

    @override
    def _forward_example_input(self) -> None:
        if self._mesh.size(Axis.PIPELINE) == 1:
            super()._forward_example_input()

    @property
    @override
    def total_training_modes(self) -> dict[str, int]:
        modes = [training for _, training in self._whole.layers.values()]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    @override
    def total_parameters(self) -> int:
        return sum(elements for elements, _ in self._whole.parameters.values())

    @property
    @override
    def trainable_parameters(self) -> int:
        return sum(elements for elements, trained in self._whole.parameters.values() if trained)


def in_model_order(stages: Sequence[Sequence[str]]) -> list[str]:
    """Put the names of modules, of which each stage has some, into the order of the whole model.

    Children of one module that are numbered go by their numbers (``blocks.2`` before ``blocks.10``), whatever stages
    have them; others stay in the order in which each stage has them, those of earlier stages first.

    Args:
        stages: The names that each stage has, in its order, parents before children.
    """
    children: dict[str, list[str]] = {}
    for names in stages:
        places: dict[str, int] = {}
        for name in names:
            parent = name.rpartition(".")[0]
            known = children.setdefault(parent, [])
            if name not in known:
                known.insert(places.get(parent, 0), name)
            places[parent] = known.index(name) + 1
    for known in children.values():
        if all(name.rpartition(".")[2].isdigit() for name in known):
            known.sort(key=lambda name: int(name.rpartition(".")[2]))

    def below(parent: str) -> list[str]:
        return [name for child in children.get(parent, ()) for name in (child, *below(child))]

    return below("")
