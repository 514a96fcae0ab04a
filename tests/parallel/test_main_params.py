"""Main parameters: sharded steps are bitwise the whole ones, whatever happens to gradients and weights in between."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh, ShardSpec, set_shard_spec
from lightning_moe.parallel.gradients import GradientReducer
from lightning_moe.parallel.main_params import MainParams, gather_in_forward
from tests.distributed import RankPool
from tests.optimizers import Lion

WIDTH = 37  # no multiple of the alignment, so that parameters end in the middle of a vector


class Net(nn.Module):
    """Dense layers, an expert parameter, a channels_last weight and one that is not always used."""

    def __init__(self, mesh: ParallelMesh, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Conv2d(3, 5, 3)
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.idle = nn.Parameter(torch.randn(70))
        experts = torch.randn(4, WIDTH)
        size, rank = mesh.size("expert"), mesh.rank("expert")
        index = tuple(range(rank * 4 // size, (rank + 1) * 4 // size))
        self.experts = nn.Parameter(experts[list(index)].clone())
        set_shard_spec(self, "experts", ShardSpec("expert", 0, 4, index))
        self.to(dtype)

    def forward(self, x: Tensor, use_idle: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        out = (x * self.experts.sum(0)).sum() + self.conv(x[:, :27].reshape(-1, 3, 3, 3)).tanh().sum()
        return out * self.idle.sum() if use_idle else out


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, foreach=False),
    "adamw-foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "adamw-fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "lion": partial(Lion, lr=0.01),
}


def step(
    mesh: ParallelMesh,
    optimizer: str,
    shard: bool,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
    bucket_bytes: int = 6000,
    change: Callable[[int, Net, Any], None] | None = None,
    accumulate: int = 1,
    mark: bool = False,
) -> dict[str, Tensor]:
    """Train, and return this rank's weights."""
    net = Net(mesh, dtype)
    for block in net.blocks if mark else ():
        gather_in_forward(block)
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    optim = OPTIMIZERS[optimizer]([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    mains = MainParams([optim])
    reducer = GradientReducer(net, mesh, bucket_bytes, mains, shard=shard)
    if mark:
        mains.overlap_with(net)
        assert mains.overlap == shard
    data = torch.Generator().manual_seed(1 + mesh.rank("data"))
    for number in range(steps):
        optim.zero_grad()
        for micro in range(accumulate):
            x = torch.randn(4, WIDTH, generator=data, dtype=torch.float64).to(dtype)
            mains.wait(marked=False)
            loss = net(x, use_idle=number % 2 == 1 and mesh.rank("data") == 0)
            mains.wait()
            if micro == accumulate - 1:
                reducer.arm()
                loss.backward()
                reducer.finish()
                continue
            with reducer.no_sync():
                reducer.arm()
                loss.backward()
                reducer.finish()
        if change is not None:
            change(number, net, optim)
        optim.step()
    mains.close()
    reducer.close()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def both(expert: int, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = ParallelMesh.build(ParallelConfig(expert=expert))
    return step(mesh, *args, shard=True, **kwargs), step(mesh, *args, shard=False, **kwargs)


def check_same(results: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    start = Net(ParallelMesh.single())
    for sharded, whole in results:
        for name, value in whole.items():
            assert torch.equal(sharded[name], value), name
            assert value.stride() == sharded[name].stride()
        assert not torch.equal(whole["blocks.0.weight"].float(), start.blocks[0].weight)  # it has learned something


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("world_size", "expert"), [(2, 1), (4, 2)])
def test_sharded_steps_are_bitwise_whole_steps(ranks: RankPool, world_size: int, expert: int, optimizer: str) -> None:
    check_same(ranks.run(world_size, both, expert, optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precisions(ranks: RankPool, dtype: torch.dtype) -> None:
    check_same(ranks.run(2, both, 1, "adamw", dtype=dtype))


def test_accumulation_and_waiting_in_forward(ranks: RankPool) -> None:
    """A parameter that one rank uses in some windows only; blocks that wait for their own weights."""
    check_same(ranks.run(2, both, 1, "adamw", accumulate=3, mark=True))


def small_steps(shard: bool) -> list[float]:
    mesh = ParallelMesh.build(ParallelConfig())
    weight = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    module = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(module.parameters(), lr=2**-12)
    mains = MainParams([optimizer])
    reducer = GradientReducer(module, mesh, 2**20, mains, shard=shard)
    seen = []
    for _ in range(32):
        optimizer.zero_grad()
        reducer.arm()
        (-weight.sum()).backward()
        reducer.finish()
        optimizer.step()
        seen.append(float(weight[-1]))
    return seen


@pytest.mark.parametrize("shard", [False, True])
def test_small_steps_add_up_in_low_precision(ranks: RankPool, shard: bool) -> None:
    """32 steps of 2^-12 make one unit in the last place of a bfloat16 1.0; each alone is rounded away."""
    for seen in ranks.run(2, small_steps, shard):
        assert seen[0] == 1.0
        assert seen[-1] == 1.0 + 2**-7


def zero_in_many_ways(shard: bool) -> list[float]:
    """The gradient that the optimizer sees after each way of starting over, or of going on."""
    mesh = ParallelMesh.build(ParallelConfig())
    weight = nn.Parameter(torch.zeros(200))
    module = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    reducer = GradientReducer(module, mesh, 2**20, MainParams([optimizer]), shard=shard)
    (stepped,) = optimizer.param_groups[0]["params"]
    seen = []

    def backward(sync: bool = True) -> None:
        reducer.arm()
        if sync:
            (weight.sum() * (1.0 + mesh.rank("data"))).backward()
            reducer.finish()
        else:
            with reducer.no_sync():
                (weight.sum() * (1.0 + mesh.rank("data"))).backward()
                reducer.finish()

    def note() -> None:
        seen.append(float(stepped.grad.mean()))

    backward()
    note()  # 1.5
    backward()  # on top of a reduced gradient
    note()  # 3
    optimizer.zero_grad()
    backward()
    note()  # 1.5
    module.zero_grad()  # by the model's parameters
    backward()
    note()  # 1.5
    optimizer.zero_grad(set_to_none=False)
    backward()
    note()  # 1.5
    optimizer.zero_grad()
    backward(sync=False)
    backward()
    note()  # 3
    optimizer.zero_grad()
    backward(sync=False)
    optimizer.zero_grad()  # in the middle of a window
    backward()
    note()  # 1.5
    optimizer.zero_grad()
    backward(sync=False)
    module.zero_grad()
    backward()
    note()  # 1.5
    module.zero_grad(set_to_none=False)
    backward()
    note()  # 1.5
    optimizer.zero_grad()
    backward(sync=False)
    optimizer.zero_grad(set_to_none=False)
    backward()
    note()  # 1.5
    stepped.grad.mul_(10)  # as clipping does
    backward()
    note()  # 16.5
    stepped.grad = torch.ones_like(stepped)
    backward()
    note()  # 2.5
    return seen


@pytest.mark.parametrize("shard", [False, True])
def test_starting_over_is_noticed(ranks: RankPool, shard: bool) -> None:
    for seen in ranks.run(2, zero_in_many_ways, shard):
        assert seen == [1.5, 3.0, 1.5, 1.5, 1.5, 3.0, 1.5, 1.5, 1.5, 1.5, 16.5, 2.5]


def look_at_gradients() -> tuple[bool, bool, list[float], str]:
    mesh = ParallelMesh.build(ParallelConfig())
    weight = nn.Parameter(torch.zeros(5, 40))
    module = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    reducer = GradientReducer(module, mesh, 2**20, MainParams([optimizer]), shard=True)
    scale = torch.arange(200.0).view(5, 40)
    reducer.arm()
    (weight * scale * (1.0 + mesh.rank("data"))).sum().backward()
    reducer.finish()
    full = reducer.full_grad(weight)
    assert full is not None
    assert weight.grad is not None
    unreadable = bool(weight.grad.isnan().all()) and weight.grad.shape == weight.shape
    try:
        weight.grad.mul_(2)
        writable = True
    except RuntimeError:
        writable = False
    weight.grad = torch.ones_like(weight)
    try:
        reducer.arm()
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return unreadable, writable, [float((full - 1.5 * scale).abs().max()), float(full.sum())], refused


def test_gradients_of_the_model_show_that_they_are_elsewhere(ranks: RankPool) -> None:
    """NaN to read, an error to write; ``full_grad`` has them."""
    for unreadable, writable, (error, total), refused in ranks.run(2, look_at_gradients):
        assert unreadable
        assert not writable
        assert (error, total) == (0.0, 1.5 * 199 * 100)
        assert "optimizer_sharding=False" in refused


def write_weights(dtype: torch.dtype) -> list[bool]:
    mesh = ParallelMesh.build(ParallelConfig())
    net = Net(mesh, dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    mains = MainParams([optimizer])
    GradientReducer(net, mesh, 6000, mains, shard=True)
    kept = []
    for way in ("copy", "data"):
        values = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        for value in values.values():
            dist.broadcast(value, 0)
        for name, parameter in net.named_parameters():
            if way == "copy":
                parameter.data.copy_(values[name])
            else:
                parameter.data = values[name].clone()
        mains.refresh()
        for main in mains.by_main:
            main.grad = torch.zeros_like(main)
        optimizer.step()  # brings the main weights into the model
        kept.append(all(torch.equal(p, values[name]) for name, p in net.named_parameters()))
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_somebody_writes_are_followed(ranks: RankPool, dtype: torch.dtype) -> None:
    """In place, as loading a checkpoint does, or by another tensor."""
    assert ranks.run(2, write_weights, dtype) == [[True, True]] * 2


def write_between_steps(dtype: torch.dtype, shard: bool, way: str) -> bool:
    mesh = ParallelMesh.build(ParallelConfig())
    net = Net(mesh, dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    reducer = GradientReducer(net, mesh, 6000, MainParams([optimizer]), shard=shard)
    for number in range(3):
        if number == 2:
            for parameter in net.parameters():
                if way == "data":
                    parameter.data = torch.full_like(parameter, 0.5)
                else:
                    torch.nn.init.constant_(parameter, 0.5)
        reducer.arm()
        (sum(p.sum() for p in net.parameters()) * 0.25).backward()
        reducer.finish()
        optimizer.step()
        optimizer.zero_grad()
    return all(bool((p == 0.25).all()) for p in net.parameters())


@pytest.mark.parametrize(
    ("dtype", "shard", "way"),
    [
        (torch.float32, True, "in place"),
        (torch.float32, True, "data"),
        (torch.bfloat16, True, "in place"),
        (torch.bfloat16, True, "data"),
        (torch.bfloat16, False, "in place"),
    ],
    ids=str,
)
def test_weights_that_somebody_writes_between_steps_are_stepped(
    ranks: RankPool, dtype: torch.dtype, shard: bool, way: str
) -> None:
    assert ranks.run(2, write_between_steps, dtype, shard, way) == [True, True]


def change_dtype() -> str:
    mesh = ParallelMesh.build(ParallelConfig())
    net = Net(mesh)
    reducer = GradientReducer(net, mesh, 6000, MainParams([torch.optim.SGD(net.parameters())]), shard=True)
    net.to(torch.bfloat16)
    with pytest.raises(ConfigError) as refused:
        reducer.arm()
    return str(refused.value)


def test_a_dtype_that_changes_later_is_refused(ranks: RankPool) -> None:
    assert "torch.bfloat16 is not allowed; allowed: torch.float32" in ranks.run(2, change_dtype)[0]


def read_in_hook_and_copy() -> tuple[bool, bool]:
    mesh = ParallelMesh.build(ParallelConfig())
    net = Net(mesh)
    gather_in_forward(net.blocks[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    seen: list[bool] = []
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.register_step_post_hook(
        lambda *_: seen.append(all(torch.equal(p, old - 1) for p, old in zip(net.parameters(), before, strict=True)))
    )
    mains = MainParams([optimizer])
    reducer = GradientReducer(net, mesh, 6000, mains, shard=True)
    mains.overlap_with(net)
    copied = copy.deepcopy(net)  # the hook that waits holds process groups
    for main in mains.by_main:
        main.grad = torch.ones_like(main)
    optimizer.step()
    alike = all(torch.equal(p, old) for p, old in zip(copied.parameters(), before, strict=True))
    reducer.close()
    mains.close()
    return seen == [True], alike


def test_the_users_own_hooks_see_whole_weights_and_modules_can_be_copied(ranks: RankPool) -> None:
    assert ranks.run(2, read_in_hook_and_copy) == [(True, True)] * 2


def close_and_look() -> tuple[bool, bool, bool]:
    mesh = ParallelMesh.build(ParallelConfig())
    net = Net(mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    mains = MainParams([optimizer])
    reducer = GradientReducer(net, mesh, 6000, mains, shard=True)
    reducer.arm()
    net(torch.ones(2, WIDTH)).backward()
    reducer.finish()
    grads = [weakref.ref(main.grad.untyped_storage()) for main in mains.by_main if main.grad is not None]
    reducer.close()
    mains.close()
    gc.collect()
    held = all(p in mains.by_main for group in optimizer.param_groups for p in group["params"])
    return len(grads) > 0, all(grad() is None for grad in grads), held


def test_buffers_are_freed_and_main_parameters_kept(ranks: RankPool) -> None:
    """A checkpoint may still be saved after training."""
    assert ranks.run(2, close_and_look) == [(True, True, True)] * 2


def unfreeze() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = ParallelMesh.build(ParallelConfig())
    results = []
    for shard in (True, False):
        net = Net(mesh)
        net.blocks.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
        mains = MainParams([optimizer])
        reducer = GradientReducer(net, mesh, 6000, mains, shard=shard)
        for number in range(4):
            if number == 2:
                net.blocks.requires_grad_(True)
                optimizer.add_param_group({"params": list(net.blocks.parameters()), "lr": 0.02})
            optimizer.zero_grad()
            reducer.arm()
            net(torch.ones(2, WIDTH)).backward()
            reducer.finish()
            optimizer.step()
        assert mains.shards(optimizer) == shard
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
        results.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return results[0], results[1]


def test_parameters_that_join_later(ranks: RankPool) -> None:
    """As fine-tuning callbacks add them."""
    check_same(ranks.run(2, unfreeze))


def memory() -> tuple[int, int, int]:
    mesh = ParallelMesh.build(ParallelConfig())
    net = Net(mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    reducer = GradientReducer(net, mesh, 2**20, MainParams([optimizer]), shard=True)
    reducer.arm()
    net(torch.ones(2, WIDTH), use_idle=True).backward()
    reducer.finish()
    optimizer.step()
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    return held, sum(p.numel() for p in net.parameters()), len(optimizer.state) - len(list(net.parameters()))


def test_state_is_divided_among_the_ranks(ranks: RankPool) -> None:
    (first, total, more), (second, _, _) = ranks.run(2, memory)
    assert first + second == total
    assert abs(first - second) <= 128 * 10  # alignment of ten parameters
    assert more == 0  # positions are the same as without sharding
