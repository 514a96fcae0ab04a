"""Figures in the docs that the package itself knows are those of the package."""

from __future__ import annotations

import re

import pytest
import yaml

from lightning_moe import ChronosMoE
from lightning_moe.metrics import PUBLISHED, published_relative
from tests.docs.pages import DOCS, ROOT, pages


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_figures(model: str) -> None:
    text = (DOCS / "benchmarks.md").read_text()
    score = published_relative(model)
    assert f"| {model} | {score.mase:.3f} | {score.wql:.3f} |" in text


def test_size_of_the_default_model() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "chronos_moe_cpu.yaml").read_text())
    model = ChronosMoE(recipe["model"]["init_args"]["config"])
    size = sum(parameter.numel() for parameter in model.network().parameters())
    told = [(page, number) for page in pages() for number in re.findall(r"([\d,]+) parameters", page.read_text())]
    assert told
    assert all(int(number.replace(",", "")) == size for _, number in told), told
