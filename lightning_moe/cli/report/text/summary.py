"""What a run of a language model came to, as it is written to ``summary.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lightning_moe.cli.report.summary import RunSummary, with_nan


@dataclass(frozen=True, kw_only=True)
class TextSummary(RunSummary):
    """A run of a language model."""

    bits_per_byte: float
    """Bits per byte of the held-out text by the model."""
    gzip_bits_per_byte: float
    """The same by gzip at level 9."""
    bz2_bits_per_byte: float
    """The same by bzip2 at level 9."""
    xz_bits_per_byte: float
    """The same by xz at level 9, extreme."""
    held_out_bytes: int
    """Size of the held-out text that was compressed."""
    test_loss: float
    """Loss on the held-out text in nats per token."""
    tokens_seen: int | None
    """Number of tokens that all ranks together were trained on; null when this run has not trained."""
    sample_prompt: str
    """The beginning of the held-out text."""
    sample: str
    """How the model goes on after the prompt."""

    @override
    @classmethod
    def _restored(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values | with_nan({name: values[name] for name in ("bits_per_byte", "test_loss")})
