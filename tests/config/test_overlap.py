"""Settings of overlapped exchanges, from Python and from YAML."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import lightning_moe
from lightning_moe import ConfigError, OverlapConfig, config
from lightning_moe.config.mapping import from_mapping


class Strategy:
    """Takes the argument as MoEStrategy does."""

    def __init__(self, overlap: OverlapConfig | None = None) -> None:
        self.overlap = overlap


def test_it_is_public() -> None:
    assert lightning_moe.OverlapConfig is config.OverlapConfig
    assert "OverlapConfig" in config.__all__


def test_by_default_the_machine_decides() -> None:
    assert asdict(OverlapConfig()) == {
        "dispatch": "auto",
        "chunk": "auto",
        "expert_groups": None,
        "save": "fc1",
        "attention_chunks": None,
        "sm_margin": None,
        "link_gigabytes_per_second": None,
        "gemm_teraflops": None,
        "wait_at_once": False,
    }


def test_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Strategy, "strategy")
    text = "strategy: {overlap: {dispatch: p2p, chunk: expert, expert_groups: 4, save: recompute, gemm_teraflops: 700}}"
    given = parser.parse_string(text).strategy.overlap.as_dict()
    assert from_mapping(OverlapConfig, given, "overlap") == OverlapConfig(
        dispatch="p2p", chunk="expert", expert_groups=4, save="recompute", gemm_teraflops=700.0
    )


def test_to_json_and_back() -> None:
    given = OverlapConfig(chunk="source", attention_chunks=2, link_gigabytes_per_second=22.5, wait_at_once=True)
    assert from_mapping(OverlapConfig, json.loads(json.dumps(asdict(given))), "overlap") == given


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("dispatch", "nvshmem", "auto, blocking, p2p"),
        ("dispatch", None, "auto, blocking, p2p"),
        ("chunk", "token", "auto, source, expert"),
        ("expert_groups", 0, "at least 1"),
        ("expert_groups", 1.5, "an integer or null"),
        ("expert_groups", True, "an integer or null"),
        ("save", "all", "fc1, recompute, redispatch"),
        ("attention_chunks", 0, "at least 1"),
        ("attention_chunks", "2", "an integer or null"),
        ("link_gigabytes_per_second", 0.0, "greater than 0"),
        ("link_gigabytes_per_second", float("nan"), "greater than 0"),
        ("link_gigabytes_per_second", "fast", "a number or null"),
        ("link_gigabytes_per_second", float("inf"), "a finite number"),
        ("gemm_teraflops", float("inf"), "a finite number"),
        ("gemm_teraflops", -1.0, "greater than 0"),
        ("wait_at_once", 1, "true or false"),
    ],
)
def test_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        OverlapConfig(**{field: value})
    assert refused.value.field == f"overlap.{field}"
    assert refused.value.value is value
    assert allowed in refused.value.allowed
    assert repr(value) in str(refused.value)


def test_groups_of_experts_without_chunks_of_experts_are_refused() -> None:
    """They would do nothing."""
    for chunk in ("auto", "expert"):
        OverlapConfig(chunk=chunk, expert_groups=4)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"overlap\.expert_groups: 4 is not allowed; allowed: null with chunk: source"
    ):
        OverlapConfig(chunk="source", expert_groups=4)
