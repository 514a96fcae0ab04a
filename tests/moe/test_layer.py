"""The layer in a single process, against loops over tokens and experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.placement import ExpertPlacement
from lightning_moe.errors import ConfigError
from lightning_moe.moe.layer import MoELayer
from lightning_moe.moe.slots import slots_of_experts
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.parallel.sharding import shard_specs
from tests.moe.cases import Case, Result, assert_same, build_layer, random_case, relative_error, run_single
from tests.moe.naive import naive_capacity, naive_choices, naive_layer

CONFIGS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "top 1": {"top_k": 1, "renormalize": False},
    "top 8 of 8": {"num_experts": 8, "top_k": 8},
    "softmax over the chosen": {"router_pre_softmax": False, "top_k": 3},
    "not renormalised": {"renormalize": False, "routed_scaling_factor": 1.7},
    "sigmoid, biased, in groups": {
        "router_score": "sigmoid",
        "num_groups": 3,
        "top_k_groups": 2,
        "expert_bias": True,
        "routed_scaling_factor": 2.5,
    },
    "shared expert": {"shared_expert_hidden_size": 10},
    "gated shared expert": {"shared_expert_hidden_size": 10, "shared_expert_gate": True, "activation": "relu"},
    "by series": {"routing_granularity": "series", "top_k": 3},
    "capacity by probability": {"capacity_factor": 0.7},
    "capacity by position": {"capacity_factor": 0.7, "drop_policy": "position"},
    "padded to capacity": {"capacity_factor": 1.3, "pad_to_capacity": True},
    "placement": {"expert_placement": (5, 3, 1, 0, 2, 4)},
}


def config_named(name: str, **changes: Any) -> MoEConfig:
    defaults = {"num_experts": 6, "top_k": 2, "expert_hidden_size": 12, "load_balancing": "none"}
    return MoEConfig(**(defaults | CONFIGS[name] | changes))


def run_naive(case: Case) -> Result:
    """The reference, with the gradients that autograd finds for the loops."""
    state = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in case.state.items()}
    hidden = torch.cat(case.hidden).clone().requires_grad_()
    mask = None if case.mask is None else torch.cat(case.mask)
    choices = naive_choices(case.config, state, hidden, mask)
    counts = torch.zeros(case.config.num_experts, dtype=torch.int64)
    for pairs in choices:
        for expert, _ in pairs:
            counts[expert] += 1
    dropped = 0
    if case.config.capacity_factor is not None:
        choices, dropped = naive_capacity(case.config, choices)
    output = naive_layer(case.config, state, hidden, mask, choices)
    (output * torch.cat(case.cotangent)).sum().backward()
    grads = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in state.items()
        if name != "router.expert_bias"
    }
    zero = torch.zeros((), dtype=torch.float64)
    assert hidden.grad is not None
    return Result(output.detach(), hidden.grad, grads, {}, zero, zero, counts, torch.tensor(dropped))


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["all real", "masked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_loops_over_tokens(name: str, masked: float) -> None:
    case = random_case(config_named(name), [3], sequence_length=5, masked=masked, hidden_size=8)
    assert_same(run_single(case), run_naive(case), 1e-12)


def test_accepts_tokens_without_sequences() -> None:
    case = random_case(config_named("gated shared expert"), [11], masked=0.3, hidden_size=8)
    assert_same(run_single(case), run_naive(case), 1e-12)


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (3, 0, 8)])
@pytest.mark.parametrize(
    "changes",
    [
        {"load_balancing": "global", "z_loss_coefficient": 0.1},
        {"load_balancing": "auxiliary", "capacity_factor": 1.0, "pad_to_capacity": True},
        {"num_groups": 3, "top_k_groups": 2, "expert_bias": True, "shared_expert_hidden_size": 4},
    ],
)
def test_no_tokens(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    layer = MoELayer(8, config_named("swiglu", **changes))
    hidden = torch.zeros(shape, requires_grad=True)
    output, info = layer(hidden)
    (output.sum() + info.auxiliary_loss + info.z_loss).backward()
    assert output.shape == shape
    assert info.auxiliary_loss.item() == info.z_loss.item() == 0
    assert info.tokens_per_expert.tolist() == [0] * 6
    assert hidden.grad is not None
    # Every parameter has a gradient (of zeros): a rank without tokens must not fall out of the gradient reduction.
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_nothing_real() -> None:
    layer = MoELayer(8, config_named("gated shared expert", z_loss_coefficient=0.1, load_balancing="sequence"))
    hidden = torch.full((2, 3, 8), float("nan"), requires_grad=True)
    output, info = layer(hidden, torch.zeros(2, 3, dtype=torch.bool))
    (output.sum() + info.auxiliary_loss + info.z_loss).backward()
    assert not output.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("granularity", ["token", "series"])
def test_masked_tokens_reach_nothing(granularity: Any) -> None:
    config = config_named("gated shared expert", routing_granularity=granularity, z_loss_coefficient=0.1)
    config = MoEConfig(**(vars(config) | {"load_balancing": "global"}))
    case = random_case(config, [4], sequence_length=6, masked=0.5)
    assert case.mask is not None
    poisoned = case.hidden[0].masked_fill(~case.mask[0][..., None], float("nan"))
    clean = run_single(case)
    assert not clean.output[~case.mask[0]].any()
    assert not clean.hidden_grad[~case.mask[0]].any()
    assert_same(run_single(Case(**(vars(case) | {"hidden": (poisoned,)}))), clean, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype: torch.dtype) -> None:
    """Against the same weights and tokens in float64: differences are a few roundings of the dtype."""
    config = config_named("gated shared expert", expert_hidden_size=16, shared_expert_hidden_size=16, top_k=3)
    low = random_case(config, [40], dtype=dtype)
    high = Case(
        **(
            vars(low)
            | {
                "state": {name: value.double() for name, value in low.state.items()},
                "hidden": tuple(value.double() for value in low.hidden),
                "cotangent": tuple(value.double() for value in low.cotangent),
            }
        )
    )
    actual, expected = run_single(low), run_single(high)
    assert actual.output.dtype == actual.hidden_grad.dtype == dtype
    assert all(grad.dtype == dtype for grad in actual.grads.values())
    assert_same(actual, expected, 8 * torch.finfo(dtype).eps)


def test_autocast_keeps_the_router_and_the_dtype_of_the_tokens() -> None:
    layer = MoELayer(16, config_named("gated shared expert", expert_hidden_size=16))
    hidden = torch.randn(30, 16, requires_grad=True)
    routing = layer.router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(hidden)
        rounded = layer.router(hidden)
        inner = layer.experts(hidden, [5] * 6, torch.arange(5, 31, 5, dtype=torch.int32))
    assert output.dtype == torch.float32
    assert inner.dtype == torch.bfloat16
    assert torch.equal(rounded.logits, routing.logits)
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert 1e-4 < relative_error(output, layer(hidden)[0]) < 2e-2  # bf16 was used, and was precise enough


def test_float64_is_not_rounded_under_autocast() -> None:
    case = random_case(config_named("swiglu"), [9])
    layer = build_layer(case, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(case.hidden[0])
    assert torch.equal(output, layer(case.hidden[0])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    config = config_named("capacity by probability", top_k=4, load_balancing="global", z_loss_coefficient=0.1)
    case = random_case(config, [64], dtype=dtype, masked=0.1)
    first, second = run_single(case), run_single(case)
    assert_same(first, second, 0.0)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_grouped_gemm_equals_the_loop_bitwise(activation: Any) -> None:
    cases = [
        random_case(config_named("swiglu", activation=activation, grouped_gemm=grouped), [50], dtype=torch.float32)
        for grouped in (True, False)
    ]
    assert_same(run_single(cases[0]), run_single(cases[1]), 0.0)


def test_coefficients_scale_the_losses() -> None:
    config = config_named("swiglu", load_balancing="auxiliary", auxiliary_loss_coefficient=1.0, z_loss_coefficient=1.0)
    once = run_single(random_case(config, [20]))
    config = MoEConfig(**(vars(config) | {"auxiliary_loss_coefficient": 0.25, "z_loss_coefficient": 3.0}))
    scaled = run_single(random_case(config, [20]))
    assert scaled.auxiliary_loss.item() == pytest.approx(0.25 * once.auxiliary_loss.item(), rel=1e-14)
    assert scaled.z_loss.item() == pytest.approx(3.0 * once.z_loss.item(), rel=1e-14)
    assert once.auxiliary_loss.item() > 0


def test_copies_and_pickles() -> None:
    layer = MoELayer(8, config_named("shared expert", expert_bias=True))
    hidden = torch.randn(7, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(hidden)[0], layer(hidden)[0])
        assert shard_specs(twin) == shard_specs(layer)


def test_a_pickled_mesh_without_groups_is_refused() -> None:
    layer = MoELayer(8, config_named("swiglu"), ParallelMesh(ParallelConfig(data=2, expert=2), 0))
    with pytest.raises(AssertionError, match="lost its process groups"):
        layer(torch.zeros(3, 8))


def test_parameters_and_specs() -> None:
    config = config_named("gated shared expert", activation="swiglu", expert_placement=(5, 3, 1, 0, 2, 4))
    layer = MoELayer(8, config, ParallelMesh(ParallelConfig(data=3, expert=3), 1))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "router.weight": (6, 8),
        "experts.gate_up_proj": (2, 24, 8),
        "experts.down_proj": (2, 8, 12),
        "shared_expert.gate_up_proj": (20, 8),
        "shared_expert.down_proj": (8, 10),
        "shared_expert.gate": (1, 8),
    }
    specs = shard_specs(layer)
    assert sorted(specs) == ["experts.down_proj", "experts.gate_up_proj"]
    assert {(s[0].axis, s[0].dim, s[0].size, s[0].index) for s in specs.values()} == {("expert", 0, 6, (1, 0))}


def test_slots_of_split_experts() -> None:
    """Experts 2 and 0 on the first pair of ranks, 3 and 1 on the second; a rank holds one half of two experts."""
    slots = slots_of_experts(ExpertPlacement(4, 2, (2, 0, 3, 1)), 2)
    assert slots.tolist() == [[1, 3], [5, 7], [0, 2], [4, 6]]


def test_initial_weights_do_not_depend_on_the_topology() -> None:
    config = config_named("gated shared expert", expert_placement=(5, 3, 1, 0, 2, 4))
    torch.manual_seed(3)
    whole = MoELayer(8, config)
    following = torch.rand(3)
    for rank in range(3):
        torch.manual_seed(3)
        part = MoELayer(8, config, ParallelMesh(ParallelConfig(data=3, expert=3), rank))
        assert torch.equal(torch.rand(3), following)
        assert torch.equal(part.router.weight, whole.router.weight)
        for local, expert in enumerate(part.experts.index):
            position = whole.experts.index.index(expert)
            for name, parameter in part.experts.named_parameters():
                assert torch.equal(parameter[local], whole.experts.get_parameter(name)[position])


def test_shard_keeps_the_parameter_objects() -> None:
    mesh = ParallelMesh(ParallelConfig(data=3, expert=3), 2)
    torch.manual_seed(0)
    layer = MoELayer(8, config_named("placement"))
    whole = copy.deepcopy(layer.state_dict())
    down = layer.experts.down_proj
    down.grad = torch.zeros_like(down)
    layer.shard_(mesh)
    assert layer.experts.down_proj is down
    assert down.grad is None
    assert layer.experts.index == (2, 4)
    assert torch.equal(down, whole["experts.down_proj"][4:6])
    assert shard_specs(layer)["experts.down_proj"][0].index == (2, 4)
    layer.shard_(mesh)
    assert layer.experts.index == (2, 4)
    with pytest.raises(ConfigError, match="that this module holds"):
        layer.shard_(ParallelMesh(ParallelConfig(data=2, expert=2), 0))


@pytest.mark.parametrize(
    ("changes", "parallel", "field"),
    [
        ({}, ParallelConfig(data=4, expert=4), "moe.num_experts"),
        ({"expert_hidden_size": 9}, ParallelConfig(data=2, expert_tensor=2), "moe.expert_hidden_size"),
        ({"routing_granularity": "series"}, ParallelConfig(data=1, tensor=2), "moe.routing_granularity"),
        ({"routing_granularity": "series"}, ParallelConfig(data=1, context=2), "moe.routing_granularity"),
    ],
)
def test_refuses_meshes(changes: dict[str, Any], parallel: ParallelConfig, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        MoELayer(8, config_named("swiglu", **changes), ParallelMesh(parallel, 0))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("changes", "hidden", "mask", "field"),
    [
        ({}, (3, 9), None, "hidden.shape"),
        ({}, (8,), None, "hidden.shape"),
        ({}, (3, 8), torch.ones(4, dtype=torch.bool), "mask"),
        ({}, (3, 8), torch.ones(3), "mask"),
        ({"load_balancing": "sequence"}, (3, 8), None, "moe.load_balancing"),
        ({"routing_granularity": "series"}, (3, 8), None, "moe.routing_granularity"),
    ],
)
def test_refuses_inputs(changes: dict[str, Any], hidden: tuple[int, ...], mask: Any, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        MoELayer(8, config_named("swiglu", **changes))(torch.zeros(hidden), mask)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("sequence", "number", "field"),
    [(torch.zeros(3, dtype=torch.int64), None, "num_sequences"), (torch.zeros(3), 1, "sequence")],
)
def test_refuses_sequences(sequence: torch.Tensor, number: int | None, field: str) -> None:
    layer = MoELayer(8, config_named("swiglu", load_balancing="sequence"))
    with pytest.raises(ConfigError) as error:
        layer(torch.zeros(3, 8), sequence=sequence, num_sequences=number)
    assert error.value.field == field
