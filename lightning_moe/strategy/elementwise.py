"""Optimizers that do not treat every element by itself are refused by name where their state is sharded.

Under ZeRO-1 an optimizer steps one-dim runs of a parameter's elements, each rank its own. That gives the weights of
one process only if the step of an element depends neither on other elements nor on the shape they stand in. torch says
nowhere which optimizers are like that. So a class that is not known is tried, on a whole matrix and on runs of it as
ranks hold them.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_leaves

from lightning_moe.errors import ConfigError
from lightning_moe.parallel.main_params import MainParam

_ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.ASGD,
        torch.optim.RMSprop,
        torch.optim.Rprop,
    }
)
"""torch's own, by exact type: a subclass may do anything."""

_REMEDY = "; MoEStrategy(optimizer_sharding=False) keeps whole parameters on every rank"
_REFUSED: tuple[tuple[type[Optimizer], str], ...] = (
    (torch.optim.Muon, "it orthogonalizes whole matrices" + _REMEDY),
    (torch.optim.Adafactor, "it keeps means over the rows and columns of whole matrices" + _REMEDY),
    # Whole parameters would not help these two.
    (torch.optim.LBFGS, "it takes inner products over all parameters, and evaluates the model several times in a step"),
    (torch.optim.SparseAdam, "it takes sparse gradients only, and reduced gradients are dense: use Adam"),
)

_BOUNDS = (0, 0, 4160, 10240)
"""Bounds of the runs: a rank may hold nothing of a parameter, some of it, or the rest.

Multiples of 64, see [Note: aligned cuts] in ``parallel/flat.py``: so element-wise optimizers agree bit for bit. Larger
than the 4096 elements up to which quantized optimizers keep their state in full precision.
"""
_SHAPES = ((10240,), (64, 160), (4, 16, 160), (4, 16, 4, 40))
"""Shapes of the whole, by its number of dims."""
_STEPS = 8
"""RAdam and its kind use second moments from the sixth step on; SOAP and its kind only begin with the second."""
_LEARNING_RATE = 1e-2
"""The least to try with: at the zero that a warm-up may begin with, all optimizers look the same."""


def check_elementwise(optimizer: Optimizer, mains: Mapping[Tensor, MainParam] | None = None) -> None:
    """Refuse an optimizer whose step on runs of a parameter may differ from its step on the whole.

    torch's own are known. Any other is tried by twins of it that hold small tensors; neither the optimizer itself, its
    parameters and hooks nor the random generators notice. So hooks on its step remain the user's responsibility.

    Args:
        optimizer: What ``configure_optimizers`` returned.
        mains: The main parameters that it may hold in the place of the model's. They are runs, and it is the shapes of
            the model's that some optimizers look at.

    Raises:
        ConfigError: Names the optimizer, and why it is not element-wise or cannot be tried.
    """
    if type(optimizer) in _ELEMENTWISE:
        return
    hint = next((why for kind, why in _REFUSED if isinstance(optimizer, kind)), "")
    if not hint and (fault := _fault(optimizer, mains or {})):
        hint = fault + _REMEDY
    if hint:
        raise ConfigError(
            "configure_optimizers",
            type(optimizer).__name__,
            "an optimizer that treats every element by itself, such as AdamW, SGD or Lion",
            hint,
        )


def _fault(optimizer: Optimizer, mains: Mapping[Tensor, MainParam]) -> str:
    """Try the optimizer; what speaks against sharding it, in words, or nothing."""
    # First of all: twins would share what such an attribute holds, and step the model itself.
    models = {p: mains[p].parameter if p in mains else p for group in optimizer.param_groups for p in group["params"]}
    if fault := _second_holder(optimizer, models):
        return fault
    if all(callable(getattr(type(optimizer), mode, None)) for mode in ("train", "eval")):
        return "its train() and eval() write parameters, but sharded weights are gathered after steps only"
    cuda = sorted({p.device.index for p in models if p.is_cuda})
    # isolate_rng is for Python's and NumPy's generators; with CUDA it would occupy every GPU of the host.
    with torch.random.fork_rng(cuda), isolate_rng(include_cuda=False), _silence():
        before = _generator_states(cuda)
        evaluations = 0

        def closure() -> float:
            nonlocal evaluations
            evaluations += 1
            return 0.0

        try:
            twins = []
            for run in (None, *(slice(*ends) for ends in pairwise(_BOUNDS))):
                twins.append(_twin(optimizer, models, run))
                _take_steps(twins[-1], run, closure)
            fault = _difference(twins[0], twins[1:])
        except Exception as error:
            return f"it fails on a small matrix or on runs of it ({type(error).__name__}: {error})"
        random = any(not torch.equal(a, b) for a, b in zip(before, _generator_states(cuda), strict=True))
    if evaluations > _STEPS * len(twins):
        return "it evaluates the model several times in a step, but sharded weights are gathered once, after it"
    if fault and random:
        return "it draws random numbers, which would not be those that it draws for whole parameters"
    return fault


def _second_holder(optimizer: Optimizer, models: Mapping[Tensor, Tensor]) -> str:
    """Find parameters outside of ``param_groups``, where what the ranks step does not take their place."""
    own = {id(p) for pair in models.items() for p in pair}
    places = {f"attribute {name!r}": value for name, value in _attributes(optimizer).items()}
    for i, group in enumerate(optimizer.param_groups):
        places |= {f"param_groups[{i}][{key!r}]": value for key, value in group.items() if key != "params"}
    for place, value in places.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Optimizer):
                return f"it wraps another optimizer ({place}), which would go on holding whole parameters"
            parameters = leaf.parameters() if isinstance(leaf, nn.Module) else (leaf,)
            if any(id(parameter) in own for parameter in parameters):
                return f"it holds parameters a second time ({place}), and those would stay whole"
    return ""


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer has beside its groups, state and hooks.

    ``step`` is among an instance's attributes after a scheduler has wrapped it; the wrapper steps this very optimizer.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("param_groups", "state", "step") and not _is_hooks(name)
    }


def _is_hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


_Kind = tuple[int, torch.device, torch.dtype]
"""Number of dims, device and dtype of a tensor that stands for parameters."""


def _kinds(parameters: Sequence[Tensor], models: Mapping[Tensor, Tensor]) -> dict[_Kind, int]:
    """Position of one parameter of each kind; the largest, as it tells most about the state."""
    kinds: dict[_Kind, int] = {}
    largest_last = sorted(range(len(parameters)), key=lambda i: (parameters[i].numel(), models[parameters[i]].numel()))
    for position in largest_last:
        parameter = parameters[position]
        dims = min(max(models[parameter].dim(), 1), len(_SHAPES))
        kinds[dims, parameter.device, torch.promote_types(parameter.dtype, torch.float32)] = position
    return kinds


def _twin(optimizer: Optimizer, models: Mapping[Tensor, Tensor], run: slice | None) -> Optimizer:
    """An optimizer of the same class and settings that holds a small tensor for each kind of parameter.

    Neither a copy (torch's ``__getstate__`` drops the attributes of subclasses) nor a new one (their ``__init__`` takes
    any arguments).

    Args:
        optimizer: Left as it is.
        models: The model's parameter for each that the optimizer holds.
        run: Elements to hold, in one dim; None for all, in as many dims as the parameter has.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    # Objects that hold a parameter out of sight get nothing in its place; methods of the optimizer become the twin's.
    memo: dict[int, Any] = {id(p): torch.empty(0) for pair in models.items() for p in pair}
    memo[id(optimizer)] = twin
    state: defaultdict[Any, Any] = defaultdict(dict)
    state.update({k: copy.deepcopy(v, memo) for k, v in optimizer.state.items() if not isinstance(k, Tensor)})
    groups = []
    for group in optimizer.param_groups:
        kinds = _kinds(group["params"], models)
        settings = {key: copy.deepcopy(value, memo) for key, value in group.items() if key != "params"}
        if "lr" in settings:
            settings["lr"] = _visible(settings["lr"])
        if "param_names" in settings:
            settings["param_names"] = [settings["param_names"][i] for i in kinds.values()]
        parameters = []
        for (dims, device, dtype), position in kinds.items():
            original = group["params"][position]
            parameter = nn.Parameter(_part(_values(0).to(device, dtype), dims, run))
            parameters.append(parameter)
            if present := optimizer.state.get(original):  # of the optimizers whose __init__ fills it
                state[parameter] = {
                    key: _part(_stretch(value, dtype), dims, run)
                    if isinstance(value, Tensor) and value.dim() and value.shape == original.shape
                    else copy.deepcopy(value, memo)
                    for key, value in present.items()
                }
        groups.append({**settings, "params": parameters})
    attributes = copy.deepcopy(_attributes(optimizer), memo)
    hooks: dict[str, Any] = {name: OrderedDict() for name in vars(optimizer) if _is_hooks(name)}
    vars(twin).update(attributes, **hooks, state=state, param_groups=groups)
    return twin


def _generator_states(cuda: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in cuda)]


def _visible(learning_rate: Any) -> Any:
    if isinstance(learning_rate, Tensor):
        return learning_rate.clamp(min=_LEARNING_RATE)
    return max(learning_rate, _LEARNING_RATE) if isinstance(learning_rate, float | int) else learning_rate


def _stretch(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The first elements of a state tensor, repeated where there are too few; zeros where there are none."""
    flat = value.detach().reshape(-1)[: _BOUNDS[-1]]
    if not len(flat):
        flat = flat.new_zeros(1)
    flat = flat.repeat(-(-_BOUNDS[-1] // len(flat)))[: _BOUNDS[-1]]
    return flat.to(dtype) if value.is_floating_point() else flat


def _values(seed: int) -> Tensor:
    """Random elements whose size differs along the way, so that runs differ from the whole in every mean and norm."""
    elements = torch.randn(_BOUNDS[-1], generator=torch.Generator().manual_seed(seed))
    return elements * torch.linspace(0.5, 2.0, _BOUNDS[-1])


def _part(elements: Tensor, dims: int, run: slice | None) -> Tensor:
    return (elements.view(_SHAPES[dims - 1]) if run is None else elements[run]).clone()


def _take_steps(twin: Optimizer, run: slice | None, closure: Any) -> None:
    if callable(train := getattr(twin, "train", None)):  # schedule-free optimizers refuse to step before
        train()
    for step in range(_STEPS):
        for parameter in (p for group in twin.param_groups for p in group["params"]):
            parameter.grad = _part(_values(1 + step).to(parameter), parameter.dim(), run)
        twin.step(closure=closure)  # always with one, as Lightning


def _difference(whole: Optimizer, parts: Sequence[Optimizer]) -> str:
    """What differs between an optimizer of whole tensors and those of their runs, in words; nothing if nothing does."""
    changed = False
    for i, group in enumerate(whole.param_groups):
        for j, parameter in enumerate(group["params"]):
            runs = [part.param_groups[i]["params"][j] for part in parts]
            if not _equal(parameter, torch.cat(runs)):
                return f"a tensor of {parameter.dim()} dims comes out different when its runs are stepped one by one"
            states = [part.state.get(run, {}) for part, run in zip(parts, runs, strict=True) if run.numel()]
            if fault := _state_difference(parameter, whole.state.get(parameter, {}), states):
                return fault
            changed |= not _equal(parameter, _values(0).to(parameter))
    return "" if changed else f"{_STEPS} steps of it change nothing, so that it cannot be tried"


def _state_difference(parameter: Tensor, whole: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> str:
    for key, value in whole.items():
        if not isinstance(value, Tensor | float | int):
            continue
        if any(key not in part for part in parts):
            return f"its state {key!r} exists for whole tensors only"
        others = [torch.as_tensor(part[key]) for part in parts]
        value = torch.as_tensor(value)
        if value.numel() == 1:
            same = all(other.numel() == 1 and _equal(value, other) for other in others)
        elif value.shape == parameter.shape:
            same = all(other.dim() == 1 for other in others) and _equal(value, torch.cat(others))
        else:
            return f"its state {key!r} is of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
        if not same:
            return f"its state {key!r} comes out different when runs of a tensor are stepped one by one"
    return ""


def _equal(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().reshape(-1), other.detach().reshape(-1)
    return len(one) == len(other) and bool(((one == other) | ((one != one) & (other != other))).all())


@contextmanager
def _silence() -> Iterator[None]:
    """Keep hooks on all optimizers of the process from seeing the twins, and the user from their warnings."""
    tables: tuple[dict[int, Any], ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    kept = [(hooks, dict(hooks)) for hooks in tables]
    for hooks, _ in kept:
        hooks.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for hooks, before in kept:
            hooks.update(before)
