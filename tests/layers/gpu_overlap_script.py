"""Runs overlapped attention on GPUs: ``torchrun --nproc_per_node=N -m tests.layers.gpu_overlap_script OUTPUT``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from tests.layers.gpu_script import write_results
from tests.layers.overlapped import TOLERANCES, Case, count_differences, run_overlapped, variants
from tests.layers.parallel import build_mesh
from tests.layers.test_overlapped_ways import run_cheap_checks
from tests.layers.test_ulysses_overlap import BESIDE_TENSOR, cases_of

LARGE = {"length": 4096, "width": 1024, "head": 64, "times": 100}
"""Large enough that a product is still being computed when the next exchange begins."""


def run_all() -> dict[Any, Any]:
    """The result of every case on this rank, by the ranks of the axis ``tensor``."""
    world = dist.get_world_size()
    mesh = build_mesh(context=world)
    results: dict[Any, Any] = {(1, case): run_overlapped(mesh, case) for case in all_cases(1, world)}
    if world == 4:
        both = build_mesh(tensor=2, context=2)
        results |= {(2, case): run_overlapped(both, case) for case in all_cases(2, world)}
    if world == 2:
        results["ways"] = run_cheap_checks(mesh)
    for dtype in TOLERANCES:
        for case in (Case(16, 4, "head", dtype, chunks=2), Case(16, 16, "none", dtype, chunks=3)):
            results["differences", case] = count_differences(mesh, case, **LARGE)
    return results


def all_cases(tensor: int, world: int) -> list[Case]:
    """What is compared with dense attention, and the variants of each that must be equal bit for bit."""
    kinds = BESIDE_TENSOR if tensor == 2 else ()
    cases = [replace(kind, dtype=dtype) for kind in kinds for dtype in TOLERANCES] or cases_of(world)
    return [each for case in cases for each in (case, *variants(case))]


if __name__ == "__main__":
    write_results(run_all)
