"""The network: shapes, masks, numerics, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_moe.config import MoEConfig
from lightning_moe.models.chronos_moe import ChronosMoEModel
from lightning_moe.models.chronos_moe.loss import quantile_loss_sum
from tests.models.chronos_moe.configs import contexts, small_config

DENSE_OR_MOE = pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, expert_hidden_size=16)])
NAN = torch.nan


def _model(seed: int = 0, **changes: object) -> ChronosMoEModel:
    torch.manual_seed(seed)
    return ChronosMoEModel(small_config(**changes))


def _loss(model: ChronosMoEModel, context: Tensor, target: Tensor) -> Tensor:
    output = model(context)
    normalized, observed = model.normalize_target(target, output.statistics)
    total = quantile_loss_sum(output.quantiles, normalized, observed, model.quantile_levels(normalized))
    return total + sum(routed.auxiliary_loss for routed in output.routing)


@DENSE_OR_MOE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(moe: MoEConfig | None, dtype: torch.dtype) -> None:
    model = _model(moe=moe).to(dtype)
    output = model(contexts(5))
    assert output.quantiles.shape == (5, 9, 8)
    assert output.quantiles.dtype == dtype
    assert output.statistics.loc.dtype == torch.float32
    assert output.quantiles.isfinite().all()
    assert len(output.routing) == (0 if moe is None else 2)


def test_low_precision_agrees_with_double() -> None:
    model = _model(moe=None).double()
    exact = model(contexts(4, dtype=torch.float64)).quantiles
    torch.testing.assert_close(model.float()(contexts(4)).quantiles.double(), exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.bfloat16()(contexts(4)).quantiles.double(), exact, rtol=0, atol=0.05)


def test_levels_keep_their_precision_in_bfloat16() -> None:
    model = _model().bfloat16()
    levels = model.quantile_levels(torch.zeros((), dtype=torch.bfloat16))
    assert torch.equal(levels, torch.tensor(model.config.quantiles))


def test_state_dict_holds_parameters_only() -> None:
    model = _model()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@DENSE_OR_MOE
@pytest.mark.parametrize(
    "row",
    [
        [NAN] * 24,
        [NAN] * 23 + [3.0],
        [2.5] * 24,
        [0.0] * 24,
        [NAN] * 11 + [1.0] + [NAN] * 12,
        [1e30, -2e30] * 12,
        [1e-30, 2e-30] * 12,
    ],
    ids=["nothing", "one", "constant", "zero", "one in the middle", "huge", "tiny"],
)
def test_degenerate_series_are_safe(moe: MoEConfig | None, row: list[float]) -> None:
    model = _model(moe=moe)
    context = torch.cat((torch.tensor([row]), contexts(2)))
    target = torch.tensor([[1.0, NAN] * 4, [NAN] * 8, [2.0] * 8])
    loss = _loss(model, context, target)
    loss.backward()
    assert loss.isfinite()
    assert model.denormalize(model(context)).isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_degenerate_series_leaves_the_others_alone() -> None:
    model = _model().double()
    clean = contexts(3, dtype=torch.float64)
    empty = torch.full_like(clean[:1], NAN)
    together = model(torch.cat((empty, clean))).quantiles[1:]
    torch.testing.assert_close(together, model(clean).quantiles, rtol=0, atol=1e-13)


def test_padding_of_any_length_changes_nothing() -> None:
    model = _model().double()
    short = contexts(1, 10, dtype=torch.float64)
    reference = model(short).quantiles
    for length in (12, 13, 24, 40):
        padded = torch.nn.functional.pad(short, (length - 10, 0), value=NAN)
        torch.testing.assert_close(model(padded).quantiles, reference, rtol=0, atol=1e-12)


def test_only_the_last_context_length_steps_count() -> None:
    model = _model()
    context = contexts(1, 40)
    assert torch.equal(model(context).quantiles, model(context[:, -24:]).quantiles)
    assert not torch.equal(model(context).quantiles, model(context[:, -20:]).quantiles)


def test_infinite_values_count_as_missing() -> None:
    model = _model()
    with_nan, with_inf = contexts(1).clone(), contexts(1).clone()
    with_nan[0, 5], with_inf[0, 5] = NAN, torch.inf
    assert torch.equal(model(with_nan).quantiles, model(with_inf).quantiles)


def test_empty_patches_are_not_routed() -> None:
    model = _model()
    context = torch.full((2, 24), NAN)
    context[1, -7:] = torch.arange(7.0)
    # Series 0: [REG] and two future tokens; series 1: two more patches with data. Each goes to two experts.
    for routed in model(context).routing:
        assert routed.tokens_per_expert.sum() == 2 * (3 + 5)


def test_shift_and_scale_leave_the_normalised_forecast_unchanged() -> None:
    model = _model().double()
    context = contexts(4, dtype=torch.float64)
    shifted = model(1e3 * context - 40.0)
    torch.testing.assert_close(shifted.quantiles, model(context).quantiles, rtol=0, atol=1e-10)


@pytest.mark.parametrize("use_arcsinh", [True, False])
def test_denormalize_inverts_normalize_target(use_arcsinh: bool) -> None:
    model = _model(use_arcsinh=use_arcsinh).double()
    context, target = contexts(3, dtype=torch.float64), contexts(3, 8, dtype=torch.float64, seed=1)
    target[0, 0] = 1e3  # far outside of the context
    output = model(context)
    normalized, observed = model.normalize_target(target, output.statistics)
    assert torch.equal(observed, ~target.isnan())
    assert normalized[~observed].eq(0).all()
    forecast = output._replace(quantiles=normalized[:, None].expand(3, 9, 8))
    torch.testing.assert_close(model.denormalize(forecast)[:, 4][observed], target[observed], rtol=1e-12, atol=1e-12)


def test_denormalized_quantiles_do_not_cross() -> None:
    model = _model()
    output = model(contexts(8))
    assert output.quantiles.diff(dim=1).lt(0).any()  # an untrained head crosses
    assert model.denormalize(output).diff(dim=1).ge(0).all()


def test_residual_stream_keeps_the_weights_dtype_under_autocast() -> None:
    model = _model(moe=None)
    seen: list[torch.dtype] = []
    model.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(contexts(2))
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    "moe",
    [
        None,
        MoEConfig(num_experts=3, top_k=2, expert_hidden_size=3, router_dtype="float64"),
        MoEConfig(num_experts=3, top_k=2, expert_hidden_size=3, router_dtype="float64", activation="gelu"),
    ],
    ids=["dense", "swiglu", "gelu"],
)
def test_gradients_are_those_of_finite_differences(moe: MoEConfig | None) -> None:
    model = _model(
        hidden_size=4,
        num_layers=1,
        num_heads=1,
        context_length=6,
        prediction_length=2,
        patch_length=2,
        ffn_hidden_size=3,
        quantiles=(0.2, 0.5, 0.9),
        moe=moe,
    ).double()
    names = [name for name, _ in model.named_parameters()]
    context = torch.tensor([[NAN, NAN, 1.0, 2.5, 3.1, 2.2], [0.4, NAN, 1.9, 0.3, 0.2, 0.8]], dtype=torch.float64)
    target = torch.tensor([[2.0, NAN], [0.5, 1.5]], dtype=torch.float64)

    def loss(context: Tensor, *parameters: Tensor) -> Tensor:
        given = torch.where(torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]], dtype=torch.bool), context, NAN)
        values = {f"model.{name}": value for name, value in zip(names, parameters, strict=True)}
        holder = torch.nn.ModuleDict({"model": _Loss(model)})
        result: Tensor = torch.func.functional_call(holder["model"], values, (given, target), strict=False)
        return result

    inputs = (
        context.nan_to_num(0.0).requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in model.parameters()),
    )
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-7, atol=1e-6, rtol=1e-5)


class _Loss(torch.nn.Module):
    def __init__(self, model: ChronosMoEModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor, target: Tensor) -> Tensor:
        return _loss(self.model, context, target)


def test_dense_and_moe_differ_in_the_feed_forward_layer_only() -> None:
    dense = {name for name, _ in _model(moe=None).named_parameters()}
    sparse = {name for name, _ in _model().named_parameters()}
    assert {name for name in dense if ".ffn." not in name} == {name for name in sparse if ".ffn." not in name}
    assert "blocks.0.ffn.router.weight" in sparse
    assert "blocks.0.ffn.up_proj.weight" in dense


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_series_granularity_and_every_activation_run(activation: str) -> None:
    moe = MoEConfig(num_experts=4, expert_hidden_size=8, activation=activation, routing_granularity="series")  # type: ignore[arg-type]
    model = _model(moe=moe)
    loss = _loss(model, contexts(3), torch.ones(3, 8))
    loss.backward()
    assert loss.isfinite()
