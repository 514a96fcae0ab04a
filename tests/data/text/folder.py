"""A small folder of texts, for tests that need files."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ("expert", "router", "token", "läuft", "世界", "def f(x):", "\n", "    return", "🙂", "\t", "0.5")


def write_texts(folder: Path, number: int = 60, *, seed: int = 0) -> dict[str, bytes]:
    """Write texts of different lengths into two levels of folders; return them by name."""
    draw = random.Random(seed)
    texts = {}
    for index in range(number):
        name = f"{'inner/' if index % 3 == 0 else ''}{index:03}.txt"
        # The numbers make rows of tokens distinct.
        words = (f"{draw.choice(WORDS)} {draw.randrange(10**6):06}" for _ in range(draw.randrange(1, 40)))
        text = " ".join(words).encode()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        texts[name] = text
    return texts
