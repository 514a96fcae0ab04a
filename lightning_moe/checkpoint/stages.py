"""What the stages of a pipeline have in common in a checkpoint, which shows nothing of them.

Tensors find their way by name. What is kept by position, or by rank 0 for all, is put together here when it is saved,
and divided again when it is loaded: the parameter groups of optimizers, and values that are no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_moe.checkpoint.mains import NO_MAINS
from lightning_moe.checkpoint.optimizer_state import group_names
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.stages import StateEntries, gather_stages, state_entries

ParamGroups = list[dict[str, Any]]
"""The groups of one optimizer, whose ``params`` are names."""


@dataclass(frozen=True)
class Stages:
    """What each stage of a pipeline takes out of a checkpoint.

    Attributes:
        own: The entries of this stage's ``state_dict``.
        elsewhere: Those that only other stages have.
        position: Number of this stage.
        groups: The names of the parameters in each group of each optimizer, for every stage in order.
    """

    own: StateEntries
    elsewhere: StateEntries
    position: int
    groups: list[list[list[list[str]]]]

    @classmethod
    def gather(
        cls,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        mains: Mapping[Tensor, MainParam] = NO_MAINS,
        mesh: ParallelMesh | None = None,
    ) -> Stages:
        """Ask the other stages; a collective call where there are any.

        Args:
            module: Module with this rank's part of the model.
            optimizers: Optimizers that are to be loaded.
            mains: The main parameters that the optimizers hold in the place of the module's.
            mesh: The parallel mesh; None in a process that has none.
        """
        own, groups = state_entries(module), [group_names(optimizer, module, mains) for optimizer in optimizers]
        stages = gather_stages((own, groups), mesh)
        elsewhere = {name: shape for entries, _ in stages for name, shape in entries.items() if name not in own}
        return cls(own, elsewhere, _position(mesh), [groups for _, groups in stages])

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole model's tensors, by their names in its ``state_dict``."""
        return {name: shape for name, shape in (self.own | self.elsewhere).items() if shape is not None}

    def groups_elsewhere(self, number: int) -> list[set[str]]:
        """The names in each group of one optimizer that only other stages have."""
        own = self.groups[self.position][number]
        return [
            {name for stage in self.groups for group in stage[number][i : i + 1] for name in group}.difference(names)
            for i, names in enumerate(own)
        ]

    def present(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out what only other stages have; what no stage knows stays, for torch to complain of."""
        return {name: value for name, value in values.items() if name not in self.elsewhere}

    def name_state(self, number: int, numbered: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
        """Key the whole state of one optimizer, as a process without a pipeline has saved it, by parameter name.

        Positions are those in the whole model's optimizer, which no stage has. They are known if it lists parameters in
        the order of the model, as ``self.parameters()`` does.

        Args:
            number: Number of the optimizer.
            numbered: Its ``state_dict``.
            order: The names of the whole model, in its order.

        Raises:
            ConfigError: The groups have other sizes, or the optimizer of a stage has another order.
        """
        place = {name: i for i, name in enumerate(order)}
        groups: ParamGroups = []
        names: dict[int, str] = {}
        for i, group in enumerate(numbered["param_groups"]):
            of_stages = [stage[number][i] if i < len(stage[number]) else [] for stage in self.groups]
            whole = sorted({name for stage in of_stages for name in stage}, key=lambda name: place.get(name, -1))
            ordered = all(stage == [name for name in whole if name in set(stage)] for stage in of_stages)
            if not ordered or len(whole) != len(group["params"]) or not place.keys() >= set(whole):
                raise ConfigError(
                    f"optimizer.param_groups[{i}]",
                    f"{len(whole)} parameters" if ordered else "parameters in another order than the model's",
                    f"the {len(group['params'])} of the checkpoint, in the order of the model",
                    "load the checkpoint without a pipeline and save it anew: checkpoint directories keep names",
                )
            names |= dict(zip(group["params"], whole, strict=True))
            groups.append({**group, "params": whole})
        return {"state": {names[i]: dict(values) for i, values in numbered["state"].items()}, "param_groups": groups}


def merge_groups(groups: ParamGroups, mesh: ParallelMesh | None) -> ParamGroups:
    """The groups with the parameters of all stages; a collective call.

    Settings are this stage's: all have the same (see ``check_optimizers`` of the strategy).
    """
    lists: ParamGroups = [{key: group[key] for key in ("params", "param_names") if key in group} for group in groups]
    merged, *others = gather_stages(lists, mesh)
    for other in others:
        for group, more in zip(merged, other, strict=True):
            known = set(group["params"])  # tied ones come again
            new = [i for i, name in enumerate(more["params"]) if name not in known]
            for key, values in group.items():
                values += [more[key][i] for i in new]
    return [{**group, **names} for group, names in zip(groups, merged, strict=True)]


def merge_objects(objects: Mapping[str, Any], mesh: ParallelMesh | None) -> dict[str, Any]:
    """Values by name, of the first stage that has each; a collective call."""
    merged: dict[str, Any] = {}
    for stage in reversed(gather_stages(dict(objects), mesh)):
        merged.update(stage)
    return merged


def held_before(names: Iterable[str], mesh: ParallelMesh | None) -> set[str]:
    """Names that an earlier stage has too, which then writes them; a collective call.

    Of buffers that several stages have, each with numbers of its own, DCP would take any.
    """
    stages = gather_stages(list(names), mesh)
    return {name for stage in stages[: _position(mesh)] for name in stage}


def _position(mesh: ParallelMesh | None) -> int:
    return 0 if mesh is None else mesh.rank(Axis.PIPELINE)
