"""What general compressors make of a text: the figures that a language model has to beat."""

from __future__ import annotations

import bz2
import gzip
import lzma


def compression_bits_per_byte(text: bytes) -> dict[str, float]:
    """Size after compression over size before, each compressor at its strongest.

    Args:
        text: At least one byte; all held-out documents at once, so that compressors can refer from one to another.

    Returns:
        Bits per byte by compressor: ``gzip``, ``bz2`` and ``xz``.
    """
    compressed = {
        "gzip": gzip.compress(text, compresslevel=9),
        "bz2": bz2.compress(text, compresslevel=9),
        "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(result) / len(text) for name, result in compressed.items()}
