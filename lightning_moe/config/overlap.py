"""How expert and attention layers hide their communication (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_moe.config.ranges import Rule, above, at_least, finite, validate
from lightning_moe.errors import ConfigError


def _groups_are_of_experts(config: Any) -> ConfigError | None:
    """Chunks by source hold the rows of all experts of a rank."""
    if config.expert_groups is None or config.chunk != "source":
        return None
    return ConfigError(
        "expert_groups", config.expert_groups, "null with chunk: source", "leave it out, or chunk: expert"
    )


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Exchange of tokens under computation, in expert layers and in attention over the axis ``context``.

    Raises:
        ConfigError: A value is out of range.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        at_least("expert_groups", 1),
        at_least("attention_chunks", 1),
        at_least("sm_margin", 0),
        above("link_gigabytes_per_second", 0.0),
        finite("link_gigabytes_per_second"),
        above("gemm_teraflops", 0.0),
        finite("gemm_teraflops"),
        _groups_are_of_experts,
    )

    dispatch: Literal["auto", "blocking", "p2p"] = "auto"
    """How tokens reach their experts: one all-to-all that is waited for, messages between pairs of ranks under
    computation, or whichever of the two is faster on this machine: both are tried in the first training step, unless
    ``link_gigabytes_per_second`` and ``gemm_teraflops`` are given, from which a cost model then predicts it."""
    chunk: Literal["auto", "source", "expert"] = "auto"
    """What a message holds: the rows of one rank, those of some experts from all ranks, or as the cost model says."""
    expert_groups: int | None = None
    """Number of groups that a rank's experts are exchanged in, with ``chunk: expert``; null asks the cost model."""
    save: Literal["fc1", "recompute", "redispatch"] = "fc1"
    """What backward keeps: rows and the first projection's output, rows alone (it computes that projection again), or
    neither (it exchanges the rows again, too)."""
    attention_chunks: int | None = None
    """Number of parts that attention's heads are exchanged in over the axis ``context``; 1 does not overlap, null takes
    2 with ``dispatch: p2p``, and with ``auto`` where the link of the expert layers is slower than 100 GB/s; else 1."""
    sm_margin: int | None = None
    """Multiprocessors of a GPU that products of rows and heads leave to the messages that they hide; 0 leaves none.
    Null leaves 4, and 8 in expert layers whose messages go to more than one rank."""
    link_gigabytes_per_second: float | None = None
    """What a rank can send to others, for the cost model; null measures it when training starts."""
    gemm_teraflops: float | None = None
    """Rate of the experts' matrix products, for the cost model; null measures it when training starts."""
    wait_at_once: bool = False
    """Whether every message is waited for where it is sent: the same computation without overlap, for measuring."""

    def __post_init__(self) -> None:
        validate(self, "overlap", self.rules)
