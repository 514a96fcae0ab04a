"""Optimizer state whose optimizer holds main parameters: names, marks for DCP, empty targets, cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata

from lightning_moe import ConfigError, ShardSpec, set_shard_spec
from lightning_moe.checkpoint.optimizer_state import (
    cut_state,
    empty_state,
    mark_sharded,
    name_optimizer_state,
    number_optimizer_state,
    unmark_sharded,
)
from lightning_moe.checkpoint.shards import LogicalShard
from lightning_moe.parallel.main_params import MainParam

EXPERTS = ShardSpec("expert", 0, 4, (2, 0))
"""This rank holds two experts of four."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 3))
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.scale = nn.Parameter(torch.zeros(()))
        self.gain = nn.Parameter(torch.zeros(1))
        set_shard_spec(self, "experts", EXPERTS)


RUNS = {"experts": range(2, 6), "weight": range(5, 5), "scale": range(1), "gain": range(1)}


def held_by(net: nn.Module, runs: dict[str, range] = RUNS) -> tuple[torch.optim.Optimizer, dict[Tensor, MainParam]]:
    """AdamW on the main parameters of a rank."""
    mains = {}
    for name, run in runs.items():
        main = nn.Parameter(torch.zeros(len(run)))
        mains[main] = MainParam(net.get_parameter(name), main, run)
    return torch.optim.AdamW(list(mains), lr=1e-2), mains


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape) + 1
    optimizer.step()


def metadata_of(state: dict[str, Any]) -> Metadata:
    """The table of contents of a file that one process writes."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({"optimizer_0": {"state": state}}, is_coordinator=True)
    return planner.create_global_plan([planner.create_local_plan()])[1]


def whole_state() -> dict[str, dict[str, Any]]:
    """What a single process with whole parameters saves; every value differs from all others."""
    shapes: dict[str, tuple[int, ...]] = {"experts": (4, 3), "weight": (3, 4), "scale": (), "gain": (1,)}
    return {
        name: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.arange(float(torch.Size(shape).numel())).view(shape) + 100 * i,
        }
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_names_are_those_of_the_model() -> None:
    net = Net()
    optimizer, mains = held_by(net)
    step(optimizer)
    numbered = optimizer.state_dict()
    named = name_optimizer_state(optimizer, numbered, net, mains)
    assert list(named["state"]) == list(RUNS)
    assert named["param_groups"][0]["params"] == list(RUNS)
    again = number_optimizer_state(optimizer, named, net, mains)
    assert again["param_groups"] == numbered["param_groups"]
    assert all(again["state"][i]["exp_avg"] is numbered["state"][i]["exp_avg"] for i in range(len(RUNS)))
    with pytest.raises(ConfigError, match="parameters of the LightningModule"):
        name_optimizer_state(optimizer, numbered, net)


def test_runs_are_marked_and_counters_are_not() -> None:
    """Whatever a rank holds of a parameter: some elements, none, or its only one."""
    net = Net()
    optimizer, mains = held_by(net)
    step(optimizer)
    state = name_optimizer_state(optimizer, optimizer.state_dict(), net, mains)["state"]
    marked = mark_sharded(state, net, mains)
    sizes = {"experts": (4, 3), "weight": (3, 4), "scale": (), "gain": (1,)}
    # Elements 2 to 5 of this rank's [2, 3], whose rows are experts 2 and 0.
    chunks = {
        "experts": [((2, 2), (1, 1)), ((0, 0), (1, 3))],
        "weight": [],
        "scale": [((), ())],
        "gain": [((0,), (1,))],
    }
    for name, values in marked.items():
        assert not isinstance(values["step"], LogicalShard)
        assert values["step"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            value = values[key]
            assert isinstance(value, LogicalShard)
            assert value.size() == sizes[name]
            found = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in value.__create_chunk_list__()]
            assert found == chunks[name]
    back = unmark_sharded(marked)
    assert all(torch.equal(back[name]["exp_avg"], state[name]["exp_avg"]) for name in RUNS)


def test_counters_of_one_dim_are_told_from_runs_of_one_element() -> None:
    """Some optimizers keep their counters as ``[1]``; under ``gain`` that is the shape of a run."""
    net = Net()
    _, mains = held_by(net)
    state = {name: {"count": torch.ones(1), "exp_avg": torch.zeros(len(run))} for name, run in RUNS.items()}
    marked = mark_sharded(state, net, mains)
    for values in marked.values():
        assert not isinstance(values["count"], LogicalShard)
        assert isinstance(values["exp_avg"], LogicalShard)


def test_state_that_is_no_run_is_refused_by_name() -> None:
    net = Net()
    _, mains = held_by(net)
    for shape in ((3,), (4, 1)):
        with pytest.raises(ConfigError, match="optimizer state 'sum' of experts") as error:
            mark_sharded({"experts": {"sum": torch.zeros(shape)}}, net, mains)
        assert "optimizer_sharding=False" in error.value.hint
    other = {"weight": {"row_var": torch.zeros(3, 1)}}
    with pytest.raises(ConfigError, match="optimizer state 'row_var' of weight"):
        cut_state(other, net, mains)
    optimizer, mains = held_by(net)
    with pytest.raises(ConfigError, match="optimizer state 'row_var' of weight"):
        empty_state("optimizer_0", optimizer, metadata_of(other), net, mains)


def test_targets_have_the_shapes_of_the_main_parameters() -> None:
    net = Net()
    optimizer, mains = held_by(net)
    state = empty_state("optimizer_0", optimizer, metadata_of(whole_state()), net, mains)
    assert list(state) == list(RUNS)
    for name, values in state.items():
        assert values["exp_avg"].shape == (len(RUNS[name]),)
        assert values["exp_avg"].size() == whole_state()[name]["exp_avg"].size()
        assert values["step"].shape == ()
        assert not isinstance(values["step"], LogicalShard)


def test_targets_of_an_optimizer_that_has_one_scalar_only() -> None:
    """No other parameter tells what is a counter: ``step`` is one by name."""
    net = nn.ParameterDict({"scale": nn.Parameter(torch.zeros(()))})
    saved = {"scale": {"step": torch.tensor(7.0), "exp_avg": torch.tensor(1.0)}}
    for run in (range(1), range(1, 1)):
        optimizer, mains = held_by(net, {"scale": run})
        values = empty_state("optimizer_0", optimizer, metadata_of(saved), net, mains)["scale"]
        assert values["step"].shape == ()
        assert values["exp_avg"].shape == (len(run),)


def test_whole_state_is_cut_to_the_run() -> None:
    net = Net()
    net.weight = nn.Parameter(torch.zeros(4, 3).t())  # its columns are neighbours in memory
    _, mains = held_by(net, {**RUNS, "weight": range(1, 5)})
    cut = cut_state(whole_state(), net, mains)
    assert {name: values["exp_avg"].tolist() for name, values in cut.items()} == {
        # Rows 2 and 0 of [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], without the first two elements.
        "experts": [8, 0, 1, 2],
        "weight": [104, 108, 101, 105],
        "scale": [200],
        "gain": [300],
    }
    assert all(values["step"] == 7 for values in cut.values())


def test_main_parameters_that_are_whole_follow_the_parameter() -> None:
    """Low-precision weights without sharding: float32 main parameters in the parameter's shape."""
    net = Net().bfloat16()
    mains = {}
    for name in RUNS:
        main = nn.Parameter(net.get_parameter(name).detach().float())
        mains[main] = MainParam(net.get_parameter(name), main, None)
    optimizer = torch.optim.AdamW(list(mains))
    step(optimizer)
    state = name_optimizer_state(optimizer, optimizer.state_dict(), net, mains)["state"]
    marked = mark_sharded(state, net, mains)
    assert marked["experts"]["exp_avg"].size() == (4, 3)
    assert not isinstance(marked["weight"]["exp_avg"], LogicalShard)
    targets = empty_state("optimizer_0", optimizer, metadata_of(whole_state()), net, mains)
    assert targets["experts"]["exp_avg"].shape == (2, 3)
    assert cut_state(whole_state(), net, mains)["experts"]["exp_avg"].tolist() == [[6, 7, 8], [0, 1, 2]]


def test_plain_values_stay_as_they_are() -> None:
    net = Net()
    optimizer, mains = held_by(net)
    state = {"weight": {"name": "x", "momentum_buffer": None}, "scale": {}}
    assert mark_sharded(state, net, mains) == state
    targets = empty_state("optimizer_0", optimizer, metadata_of(state), net, mains)
    assert targets == {"weight": {"name": None, "momentum_buffer": None}}
    assert cut_state(state, net, mains)["weight"] == state["weight"]


def test_values_that_have_a_name_in_the_file_and_no_chunk_are_left_out() -> None:
    """No rank held any of their elements."""
    net = Net()
    optimizer, mains = held_by(net)
    state = whole_state()
    no_experts = ShardSpec("expert", 0, 0, ())
    state["experts"]["exp_avg"] = LogicalShard.wrap(torch.zeros(0, 3), (no_experts,))
    targets = empty_state("optimizer_0", optimizer, metadata_of(state), net, mains)
    assert list(targets["experts"]) == ["step"]
