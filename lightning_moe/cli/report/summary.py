"""What the summaries of all runs have in common: facts of the run, and ``summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

from torch import Tensor

SUMMARY_NAME = "summary.json"

ExpertShares = tuple[tuple[float, ...], ...]
"""Share of the choices that each expert received, by layer."""


class RunFacts(TypedDict):
    """The fields of :class:`RunSummary`, as keyword arguments of its subclasses."""

    command: str
    expert_load: ExpertShares | None
    parameters: int
    world_size: int
    seconds: float
    checkpoint: str | None


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A whole run; the fields are the keys of ``summary.json``, where NaN is null."""

    command: str
    """The command: ``fit`` or ``test``."""
    expert_load: ExpertShares | None
    """Share of the test set's choices that each expert received, by layer; null for a dense model."""
    parameters: int
    """Number of parameters of the whole model."""
    world_size: int
    """Number of ranks."""
    seconds: float
    """Wall time of the training, validation included; of the test for the command ``test``."""
    checkpoint: str | None
    """The checkpoint that was tested; null when there is none."""

    def as_json(self, indent: int | None = None) -> str:
        """Return the summary as JSON, on one line unless an indent is given."""
        return json.dumps(_without_nan(self._plain()), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a summary from :meth:`as_json`."""
        values = json.loads(text)
        if values["expert_load"] is not None:
            values["expert_load"] = tuple(tuple(layer) for layer in values["expert_load"])
        return cls(**cls._restored(values))

    def _plain(self) -> dict[str, Any]:
        """Turn the fields into what JSON has."""
        return asdict(self)

    @classmethod
    def _restored(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Turn the fields that a subclass adds back into what they were."""
        return values

    def write(self, folder: Path) -> None:
        """Write ``summary.json`` into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY_NAME).write_text(self.as_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote."""
        return cls.from_json(path.read_text(encoding="utf-8"))


def expert_shares(tokens: Tensor) -> ExpertShares:
    """Share of each expert of the tokens ``[L, E]`` that the experts of a layer received."""
    shares = tokens.double() / tokens.sum(dim=1, keepdim=True).clamp(min=1)
    return tuple(tuple(layer) for layer in shares.tolist())


def with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn null back into NaN."""
    return {key: math.nan if value is None else value for key, value in values.items()}


def _without_nan(value: Any) -> Any:
    """Replace NaN, which strict JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value
