"""Which optimizers may step runs of a parameter's elements: small ones of every kind, tried."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_moe import ConfigError
from lightning_moe.parallel.main_params import MainParam
from lightning_moe.strategy.elementwise import check_elementwise
from tests.optimizers import Lion, Simple

# ---- optimizers that are element-wise


class SignSGD(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad.sign()


class CautiousAdamW(AdamW):
    """Undoes the step of elements that went along their gradient; calls the hooked step of its base class."""

    def step(self, closure: Any = None) -> Any:
        before = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        loss = super().step(closure)
        with torch.no_grad():
            for group, olds in zip(self.param_groups, before, strict=True):
                for p, old in zip(group["params"], olds, strict=True):
                    p.copy_(torch.where((p - old) * p.grad > 0, old, p))
        return loss


class StartedAdagrad(Adagrad):
    """Its state exists from the beginning."""


class Counting(Simple):
    """An odd ``__init__``, attributes that torch's ``__getstate__`` drops, and a method kept as an attribute."""

    def __init__(self, model: nn.Module, *, horizon: int) -> None:
        super().__init__(model.parameters())
        self.horizon, self.taken = horizon, {"steps": 0}
        self.rule = self.decayed

    def decayed(self, grad: Tensor) -> Tensor:
        return grad * (1 - self.taken["steps"] / self.horizon)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        self.taken["steps"] += 1
        return self.rule(grad)


class ScheduleFree(Optimizer):
    """Schedule-free AdamW: counters in the group, and no step before ``train()``."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "weight_sum": 0.0, "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() first")
            group["k"] += 1
            weight = group["lr"] ** 2
            group["weight_sum"] += weight
            fraction = weight / group["weight_sum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"], state["exp_avg_sq"] = p.clone(), torch.zeros_like(p)
                state["exp_avg_sq"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                scaled = p.grad / (state["exp_avg_sq"] / (1 - 0.999 ** group["k"])).sqrt().add_(1e-8)
                p.lerp_(state["z"], fraction).add_(scaled, alpha=group["lr"] * (0.9 * (1 - fraction) - 1))
                state["z"].sub_(scaled, alpha=group["lr"])
        return loss


class Network(nn.Module):
    """Parameters of one to four dims, one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5, dtype=dtype)
        self.experts = nn.Parameter(torch.ones(2, 3, 4, dtype=dtype))
        self.kernel = nn.Parameter(torch.ones(2, 3, 2, 2, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))


def matrices_and_vectors(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda model: AdamW(model.parameters()),
        lambda model: SGD(model.parameters(), momentum=0.9, fused=True),
        lambda model: Lion(model.parameters()),
        lambda model: Lion(matrices_and_vectors(model)),
        lambda model: Lion(model.parameters(), lr=torch.tensor(1e-4)),
        lambda model: Lion(model.named_parameters()),
        lambda model: SignSGD(model.parameters(), lr=1),
        lambda model: CautiousAdamW(matrices_and_vectors(model), lr=1e-3),
        lambda model: CautiousAdamW(model.parameters(), amsgrad=True, foreach=True),
        lambda model: CautiousAdamW(model.parameters(), fused=True),
        lambda model: StartedAdagrad(model.parameters(), initial_accumulator_value=0.5),
        lambda model: Counting(model, horizon=10_000),
        lambda model: ScheduleFree(model.parameters()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_elementwise_optimizers_pass(make: Callable[[nn.Module], Optimizer], dtype: torch.dtype) -> None:
    check_elementwise(make(Network(dtype)))


@pytest.mark.parametrize(
    "kind",
    [
        *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
        *(torch.optim.Adamax, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.RMSprop),
        torch.optim.Rprop,
    ],
)
def test_torchs_own_pass_when_they_are_tried(kind: type[Optimizer]) -> None:
    """They pass by their type; a subclass that adds nothing is tried, and the trial has to agree."""
    check_elementwise(kind(Network().parameters()))
    check_elementwise(type("Mine", (kind,), {})(Network().parameters()))


# ---- optimizers that are not


class LAMB(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad * (p.norm() / grad.norm())


class NovoGrad(Simple):
    """One second moment per tensor."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        second = state.setdefault("second_moment", grad.square().sum())
        second.lerp_(grad.square().sum(), 0.1)
        return grad / second.sqrt()


class Centralized(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True) if grad.dim() > 1 else grad


class ConvolutionsOnly(Simple):
    """Looks at the fourth dim, which matrices do not have."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad / grad.std() if grad.dim() == 4 else grad


class DecaysMatrices(AdamW):
    """Element-wise but for the shape."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"] if p.dim() > 1):
                p.mul_(0.99)
        return super().step(closure)


class Factored(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if grad.dim() < 2:
            return grad
        rows = state.setdefault("rows", torch.zeros(grad.shape[:-1]))
        rows.lerp_(grad.square().mean(-1), 0.1)
        return grad / rows.sqrt().unsqueeze(-1)


class Preconditioned(Simple):
    """A square matrix per parameter, made in ``__init__``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for p in self.param_groups[0]["params"]:
            self.state[p]["gram"] = torch.eye(len(p) if p.dim() else 1)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return (state["gram"] @ grad.flatten(1)).view_as(grad) if grad.dim() > 1 else grad


class Orthogonal(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not group["orthogonal"]:
            return grad.sign()
        if grad.dim() != 2:
            raise ValueError(f"a matrix is needed, not {grad.dim()} dims")
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        return left @ right


class Together(AdamW):
    """Clips by the norm over all parameters that it holds; no tensor by itself would tell."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e-3)
        return super().step(closure)


class LateLAMB(LAMB):
    """Element-wise for the first five steps."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        return grad if state["step"] < 6 else super().update(p, grad, state, group)


class RowStatistics(Simple):
    """Changes the weights element by element so far."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["rows"] = grad.sum(-1)
        return grad


class OnlyInState(Simple):
    """What it gathers over the tensor reaches the weights much later."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["largest"] = max(state.get("largest", 0.0), float(grad.abs().max()) if grad.numel() else 0.0)
        return grad


class Langevin(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad + torch.randn_like(grad)


class OwnGenerator(Simple):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.generator = torch.Generator().manual_seed(1)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad + torch.rand(grad.shape, generator=self.generator)


class SharpnessAware(SGD):
    """Takes the gradient at a second point."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "needs a closure"
        closure()
        return super().step(closure)


class NeedsElements(Simple):
    """Fails on a rank that holds no element of a parameter."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad * grad.isfinite().max(dim=0).values.any()


class Broken(Simple):
    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise KeyError("momentum")


class Lookahead(Optimizer):
    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class Flattening(Simple):
    """Keeps its own list of parameters, as LBFGS does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.flat = {"all": list(self.param_groups[0]["params"])}


class WithModel(Simple):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters())
        self.model = model


class Idle(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        return None


DIFFERENT = "comes out different when"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "inner products over all parameters"),
        (lambda model: torch.optim.SparseAdam(model.parameters()), "sparse gradients only"),
        (lambda model: torch.optim.Muon([model.first.weight]), "orthogonalizes whole matrices"),
        (lambda model: torch.optim.Adafactor(model.parameters()), "rows and columns of whole matrices"),
        (lambda model: type("MyMuon", (torch.optim.Muon,), {})([model.first.weight]), "orthogonalizes"),
        (lambda model: LAMB(model.parameters()), DIFFERENT),
        (lambda model: LAMB([model.first.bias]), DIFFERENT),
        (lambda model: NovoGrad(model.parameters()), DIFFERENT),
        (lambda model: Centralized(model.parameters()), DIFFERENT),
        (lambda model: ConvolutionsOnly(model.parameters()), "a tensor of 4 dims " + DIFFERENT),
        (lambda model: DecaysMatrices(model.parameters()), DIFFERENT),
        (lambda model: Factored(model.parameters()), DIFFERENT),
        (lambda model: Orthogonal([{"params": [model.first.weight], "orthogonal": True}]), "(ValueError: a matrix is"),
        (lambda model: Together(model.parameters()), DIFFERENT),
        (lambda model: LateLAMB(model.parameters()), DIFFERENT),
        (
            lambda model: RowStatistics([model.first.weight]),
            "state 'rows' is of shape (64,) for a parameter of",
        ),
        (lambda model: OnlyInState(model.parameters()), f"its state 'largest' {DIFFERENT}"),
        (lambda model: Langevin(model.parameters()), "it draws random numbers"),
        (lambda model: OwnGenerator(model.parameters()), DIFFERENT),
        (lambda model: SharpnessAware(model.parameters()), "evaluates the model several times in a step"),
        (lambda model: NeedsElements(model.parameters()), "it fails on a small matrix or on runs of it (IndexError"),
        (lambda model: Preconditioned([model.first.weight]), "it fails on a small matrix"),
        (lambda model: Broken(model.parameters()), "(KeyError: 'momentum')"),
        (lambda model: Lookahead(AdamW(model.parameters())), "it wraps another optimizer (attribute 'base')"),
        (lambda model: Flattening(model.parameters()), "holds parameters a second time (attribute 'flat')"),
        (lambda model: WithModel(model), "holds parameters a second time (attribute 'model')"),
        (lambda model: Idle(model.parameters()), "change nothing"),
    ],
)
def test_others_are_refused_with_the_reason(make: Callable[[Network], Optimizer], why: str) -> None:
    optimizer = make(Network())
    with pytest.raises(ConfigError) as refusal:
        check_elementwise(optimizer)
    error = refusal.value
    assert error.field == "configure_optimizers"
    assert error.value == type(optimizer).__name__
    assert "AdamW, SGD or Lion" in error.allowed
    assert why in error.hint
    helped = not isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam)
    assert ("MoEStrategy(optimizer_sharding=False)" in error.hint) == helped


def test_one_group_of_several_is_enough() -> None:
    """Muon with AdamW for the rest, chosen by a key of the group, as its users write it."""
    model = Network()
    vectors = {"params": [model.first.bias], "orthogonal": False}
    check_elementwise(Orthogonal([vectors]))
    with pytest.raises(ConfigError, match="a matrix is needed"):
        check_elementwise(Orthogonal([vectors, {"params": [model.first.weight], "orthogonal": True}]))


def shard(optimizer: Optimizer, elements: range) -> dict[Tensor, MainParam]:
    """Let the optimizer hold a run of every parameter, as a rank does."""
    mains = {}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            run = elements[: p.numel()]
            main = nn.Parameter(p.detach().float().reshape(-1)[run.start : run.stop].clone())
            mains[main] = MainParam(p, main, run)
            group["params"][i] = main
            if p in optimizer.state:
                values = optimizer.state.pop(p)
                values = {k: v.reshape(-1)[run.start : run.stop] if v.dim() else v for k, v in values.items()}
                optimizer.state[main] = values
    return mains


@pytest.mark.parametrize("elements", [range(0), range(1), range(3)])
def test_it_is_the_models_shapes_that_count(elements: range) -> None:
    """What an optimizer holds when it is checked are runs already."""
    for make in (DecaysMatrices, Centralized, ConvolutionsOnly):
        optimizer = make(Network().parameters())
        mains = shard(optimizer, elements)
        with pytest.raises(ConfigError, match=DIFFERENT):
            check_elementwise(optimizer, mains)
    for passing in (Lion(Network().parameters()), StartedAdagrad(Network(torch.bfloat16).parameters())):
        check_elementwise(passing, shard(passing, elements))
    flattening = Flattening(Network().parameters())
    with pytest.raises(ConfigError, match="attribute 'flat'"):
        check_elementwise(flattening, shard(flattening, elements))


@pytest.mark.parametrize("learning_rate", [0.0, 1e-30, torch.tensor(0.0)])
def test_a_warm_up_from_zero_hides_nothing(learning_rate: float | Tensor) -> None:
    model = Network()
    with pytest.raises(ConfigError, match=DIFFERENT):
        check_elementwise(LAMB(model.parameters(), lr=learning_rate))
    check_elementwise(Lion(model.parameters(), lr=learning_rate))


def test_the_optimizer_itself_notices_nothing() -> None:
    """Its weights, state, settings, counters and hooks, the scheduler's wrapper around its step, and all generators."""
    model = Network()
    optimizer = Counting(model, horizon=100)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    called: list[Any] = []
    optimizer.register_step_pre_hook(lambda *args: called.append(args))
    optimizer.register_step_post_hook(lambda *args: called.append(args))
    everywhere = register_optimizer_step_post_hook(lambda *args: called.append(args))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    attributes, taken = dict(vars(optimizer)), dict(optimizer.taken)
    state = {p: dict(values) for p, values in optimizer.state.items()}
    generators = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_elementwise(optimizer)
            with pytest.raises(ConfigError):
                check_elementwise(Langevin(model.parameters()))
        assert called == []
        SignSGD([nn.Parameter(torch.ones(1))]).step()
        assert len(called) == 1, "hooks on all optimizers are back in place"
    finally:
        everywhere.remove()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert vars(optimizer).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(optimizer).items())
    assert optimizer.taken == taken
    assert optimizer.state == state
    assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in groups]
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        assert all(p is q for p, q in zip(group.pop("params"), before.pop("params"), strict=True))
        assert group == before
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"capturable": True}, {"foreach": False}])
def test_on_the_device_of_the_parameters(settings: dict[str, bool]) -> None:
    model = Network().cuda()
    before = torch.cuda.get_rng_state()
    check_elementwise(CautiousAdamW(model.parameters(), **settings))
    for refused in (Langevin, LAMB):
        with pytest.raises(ConfigError):
            check_elementwise(refused(model.parameters()))
    assert torch.equal(torch.cuda.get_rng_state(), before)


class WithModes(ScheduleFree):
    """As the original: evaluation wants the average, training the iterate, in the same parameters."""

    def eval(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = False


def test_an_optimizer_that_moves_parameters_outside_of_its_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\(\) and eval\(\) write parameters"):
        check_elementwise(WithModes(Network().parameters()))
