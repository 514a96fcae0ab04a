"""The reducer under pipeline steps: many backward passes, weight gradients out of a queue, and a late hand-out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh
from lightning_moe.parallel.buckets import Bucket
from lightning_moe.parallel.grad_norm import global_grad_norm
from lightning_moe.parallel.gradients import GradientReducer
from lightning_moe.parallel.main_params import MainParams
from lightning_moe.parallel.sharding import set_tied
from lightning_moe.weight_grad import WeightGradQueue, linear
from lightning_moe.weight_grad.linear import MatmulGrad
from tests.distributed import RankPool

WIDTH = 5
Losses = Sequence[Sequence[Callable[[], Tensor]]]
"""For each microbatch, the loss of each chunk."""


def run_step(
    reducer: GradientReducer, losses: Losses, *, fresh: bool = True, defer: bool = True, within: Any = None
) -> None:
    """One pipeline step: all B of a chunk, the last chunk first, then all W; the gradients are not handed out."""
    queue = reducer.queue
    assert queue is not None
    reducer.begin_schedule(fresh=fresh)
    keys = []
    for chunk in reversed(range(len(losses[0]))):
        for k, chunks in enumerate(losses):
            loss = chunks[chunk]()
            if within is not None:
                within()
            reducer.start_pass(chunk, final=k == len(losses) - 1)
            if defer:
                keys.append((k, chunk))
                with queue.capture(k, chunk):
                    loss.backward()
            else:
                loss.backward()
            reducer.end_pass()
    queue.run_tail(keys)
    reducer.end_schedule()


class Layers(nn.Module):
    """Linear layers whose weight gradients can be deferred, a bias, and a parameter that nothing uses."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(count))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.idle = nn.Parameter(torch.ones(2))

    def loss(self, seed: int) -> Tensor:
        hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
        for weight in self.weights:
            hidden = linear(hidden, weight).tanh() + self.bias
        return hidden.square().mean()

    def losses(self, *seeds: int) -> Losses:
        return [[lambda seed=seed: self.loss(seed)] for seed in seeds]  # type: ignore[misc]


def plain_grads(seeds: Sequence[int]) -> dict[str, Tensor | None]:
    module = Layers()
    for seed in seeds:
        module.loss(seed).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def check_grads(module: nn.Module, expected: dict[str, Tensor | None], scale: float = 1.0) -> None:
    for name, parameter in module.named_parameters():
        grad = expected[name]
        if grad is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, scale * grad, rtol=1e-6, atol=1e-7)


def single(module: nn.Module, bucket_bytes: int = 2**20, **settings: Any) -> GradientReducer:
    return GradientReducer(module, ParallelMesh.single(), bucket_bytes, queue=WeightGradQueue(), **settings)


# ---- when buckets are reduced


def record_two_steps() -> tuple[list[list[str]], list[Tensor | None]]:
    """What starts when: computing a weight gradient ("W"), reducing a bucket, and the end of the schedule."""
    mesh = ParallelMesh.build(ParallelConfig())
    module = Layers()
    del module.bias, module.idle
    module.bias = 0.0  # type: ignore[assignment]
    reducer = GradientReducer(module, mesh, 1, queue=WeightGradQueue())
    events: list[str] = []
    all_reduce, add_to = dist.all_reduce, MatmulGrad.add_to

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append("reduce")
        return all_reduce(*args, **kwargs)

    def computed(*args: Any, **kwargs: Any) -> None:
        events.append("W")
        add_to(*args, **kwargs)

    dist.all_reduce = recorded
    MatmulGrad.add_to = computed  # type: ignore[method-assign]
    steps = []
    try:
        for _ in range(2):
            run_step(reducer, module.losses(dist.get_rank(), 2))
            events.append("end")
            reducer.finish()
            steps.append(events.copy())
            events.clear()
    finally:
        dist.all_reduce = all_reduce
        MatmulGrad.add_to = add_to  # type: ignore[method-assign]
    return steps, [parameter.grad for parameter in module.weights]


def test_buckets_are_reduced_while_others_wait_in_the_queue(ranks: RankPool) -> None:
    """From the second step on, when it is known which passes reach a parameter: under the W that are left."""
    module = Layers()
    del module.bias
    module.bias = 0.0  # type: ignore[assignment]
    for seed in (0, 2, 1, 2):
        (module.loss(seed) / 2).backward()
    for (first, second), grads in ranks.run(2, record_two_steps):
        assert first == ["W"] * 6 + ["end"] + ["reduce"] * 3
        assert second == ["W", "W", "reduce"] * 3 + ["end"]
        for grad, weight in zip(grads, module.weights, strict=True):
            torch.testing.assert_close(grad, weight.grad, rtol=1e-6, atol=1e-7)


class SharedByChunks(nn.Module):
    """Chunk 0, which is the last one to run backward, may do without the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))  # its bucket is the first

    def losses(self, *, in_both: bool) -> Losses:
        rows = torch.ones(1, WIDTH)
        first = self.weight if in_both else self.other
        return [[lambda: linear(rows, first).sum(), lambda: linear(rows, self.weight).sum()]] * 2


def test_a_parameter_of_two_chunks_is_reduced_after_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a step in which one of them has not used it."""
    module = SharedByChunks()
    reducer = single(module, bucket_bytes=1)
    reduced: list[float] = []
    reduce = Bucket.reduce

    def recorded(bucket: Bucket) -> None:
        if bucket.slots[0].parameter is module.weight:
            reduced.append(float(bucket.slots[0].view[0, 0]))
        reduce(bucket)

    monkeypatch.setattr(Bucket, "reduce", recorded)
    for in_both in (True, True, False, True):
        run_step(reducer, module.losses(in_both=in_both), defer=False)
        reducer.finish()
        assert module.weight.grad is not None
        assert torch.equal(module.weight.grad, torch.full((WIDTH, WIDTH), 4.0 if in_both else 2.0))
    assert reduced == [4.0, 4.0, 2.0, 4.0]  # complete when the reduction begins


def test_a_chunk_that_uses_a_parameter_for_the_first_time_is_refused_if_it_comes_too_late() -> None:
    module = SharedByChunks()
    reducer = single(module, bucket_bytes=1)

    def losses(*, again: bool) -> Losses:
        rows = torch.ones(1, WIDTH)
        return [[lambda: linear(rows, module.weight if again else module.other).sum(), *module.losses(in_both=True)[0]]]

    for _ in range(2):
        run_step(reducer, losses(again=False), defer=False)
        reducer.finish()
    with pytest.raises(ConfigError, match="in all of its chunks"):
        run_step(reducer, losses(again=True), defer=False)


# ---- what is handed out


@pytest.mark.parametrize("defer", [True, False])
def test_accumulation(defer: bool) -> None:
    """Over two steps and anew; unused parameters keep None, and zero_grad before the hand-out changes nothing."""
    module = Layers()
    reducer = single(module)
    for seeds, zero in (((1, 2, 3, 4), None), ((5, 6, 7, 8), True), ((9, 8, 7, 6), False)):
        with reducer.no_sync():
            run_step(reducer, module.losses(*seeds[:2]), defer=defer)
            if zero is not None:
                module.zero_grad(set_to_none=zero)
            assert all(parameter.grad is None for parameter in module.parameters())
            reducer.finish()
        check_grads(module, plain_grads(seeds[:2]))
        run_step(reducer, module.losses(*seeds[2:]), fresh=False, defer=defer)
        reducer.finish()
        check_grads(module, plain_grads(seeds))


def accumulate_on_ranks(shard: bool) -> None:
    mesh = ParallelMesh.build(ParallelConfig())
    module = Layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    reducer = GradientReducer(module, mesh, 200, MainParams([optimizer]), shard=shard, queue=WeightGradQueue())
    rank = mesh.global_rank
    for _ in range(2):  # in the second round buckets are reduced during the step
        with reducer.no_sync():
            run_step(reducer, module.losses(rank))
            optimizer.zero_grad()
            reducer.finish()
        run_step(reducer, module.losses(2 + rank, 4 + rank), fresh=False)
        reducer.finish()
        expected = plain_grads(range(6))
        for name, parameter in module.named_parameters():
            grad, whole = reducer.full_grad(parameter), expected[name]
            assert (grad is None) == (whole is None), name
            if grad is not None and whole is not None:
                torch.testing.assert_close(grad, whole / 2, rtol=1e-6, atol=1e-7)


def accumulate_both_ways() -> None:
    accumulate_on_ranks(False)
    accumulate_on_ranks(True)


def test_accumulation_on_ranks(ranks: RankPool) -> None:
    ranks.run(2, accumulate_both_ways)


class Embedded(nn.Module):
    """An embedding and an output projection, which may be one weight."""

    def __init__(self, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(7, WIDTH, generator=generator).to(dtype))
        self.head = self.embedding if tied else nn.Parameter(self.embedding.detach().clone())

    def losses(self, count: int) -> Losses:
        def loss(seed: int) -> Tensor:
            tokens = torch.randint(7, (4,), generator=torch.Generator().manual_seed(seed))
            hidden = nn.functional.embedding(tokens, self.embedding).tanh()
            return linear(hidden, self.head).float().logsumexp(-1).mean()

        return [[lambda seed=seed: loss(seed)] for seed in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_tied_weight_gets_on_two_ways_is_summed_apart(dtype: torch.dtype, defer: bool) -> None:
    """As on two stages: the sum of one way plus the sum of the other, and not one after the other."""
    sums = []
    for tied in (True, False):
        module = Embedded(tied, dtype)
        reducer = single(module)
        for _ in range(2):
            run_step(reducer, module.losses(5), defer=defer)
            reducer.finish()
        sums.append([reducer._places[p][0].view for p in dict.fromkeys((module.embedding, module.head))])
    (both,), (lookup, projection) = sums
    assert torch.equal(both, projection + lookup)


# ---- what is not the step's


def test_what_the_queue_still_holds_is_noticed() -> None:
    module = Layers()
    reducer = single(module)
    assert reducer.queue is not None
    reducer.begin_schedule(fresh=True)
    reducer.start_pass(0, final=True)
    with reducer.queue.capture(0):
        module.loss(1).backward()
    reducer.end_pass()
    with pytest.raises(AssertionError, match="still holds gradients of weights"):
        reducer.end_schedule()


@pytest.mark.parametrize("synced", [True, False])
def test_gradients_of_another_loss_are_refused(synced: bool) -> None:
    """A penalty that is added to the loss of run_schedule: the bucket may have been reduced, and Lightning zeroed."""
    module = Layers()
    reducer = single(module)
    reducer._sync = synced
    for _ in range(2):
        run_step(reducer, module.losses(1, 2))
        with pytest.raises(ConfigError, match="beside those of run_schedule"):
            module.bias.sum().backward()
        with pytest.raises(ConfigError, match="beside those of run_schedule"):
            linear(torch.ones(1, WIDTH), module.weights[0]).sum().backward()
        reducer.finish()
        check_grads(module, plain_grads((1, 2)))


def test_gradients_that_a_forward_pass_asks_for_are_its_own() -> None:
    """The sinks of weights must not take them."""
    module = Layers()
    reducer = single(module)
    seen = []

    def within() -> None:
        seen.append(torch.autograd.grad(module.loss(3), list(module.weights)))

    run_step(reducer, module.losses(1, 2), within=within)
    reducer.finish()
    check_grads(module, plain_grads((1, 2)))
    for grad, name in zip(seen[0], ("weights.0", "weights.1", "weights.2"), strict=True):
        torch.testing.assert_close(grad, plain_grads((3,))[name], rtol=1e-6, atol=1e-7)


def test_a_step_that_failed_is_forgotten() -> None:
    module = Layers()
    reducer = single(module, bucket_bytes=1)
    assert reducer.queue is not None
    for passes in range(3):
        reducer.begin_schedule(fresh=True)
        for k in range(passes):
            reducer.start_pass(0, final=k == 1)
            with reducer.queue.capture(k):
                module.loss(k).backward()
            reducer.end_pass()
        reducer.queue.clear()
        run_step(reducer, module.losses(1, 2))  # whose loss has no backward
        run_step(reducer, module.losses(1, 2))
        reducer.finish()
        check_grads(module, plain_grads((1, 2)))
    reducer.begin_schedule(fresh=True)
    module.zero_grad()
    reducer.arm()
    module.loss(4).backward()
    reducer.finish()
    check_grads(module, plain_grads((4,)))


def test_parameters_that_are_frozen_and_unfrozen_between_steps() -> None:
    """What is frozen keeps its gradient; a bucket that comes later is reduced at the end, then during the step."""
    module = Layers()
    module.weights[1].requires_grad_(False)
    reducer = single(module, bucket_bytes=1)
    for frozen, thawed in ((1, 0), (0, 1), (2, 0), (0, 2)):
        module.zero_grad()
        module.weights[frozen].requires_grad_(False)
        module.weights[thawed].requires_grad_(True)
        for _ in range(2):
            run_step(reducer, module.losses(1, 2))
            reducer.finish()
            check_grads(module, {**plain_grads((1, 2)), f"weights.{frozen}": None})


def test_a_parameter_that_is_toggled_off_keeps_what_it_has() -> None:
    """``toggle_optimizer`` freezes main parameters, so autograd still brings gradients."""
    module = Layers().to(torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    reducer = single(module, mains=MainParams([optimizer]))

    def losses() -> Losses:
        rows = torch.ones(1, WIDTH, dtype=torch.bfloat16)
        return [[lambda: (linear(rows, module.weights[0]) + linear(rows, module.weights[1]) + module.bias).sum()]] * 2

    run_step(reducer, losses())
    reducer.finish()
    mains = [reducer._places[p][0].main for p in (module.weights[0], module.weights[1], module.bias)]
    for main in mains[::2]:
        assert main is not None
        main.requires_grad_(False)
    run_step(reducer, losses(), fresh=False)
    reducer.finish()
    found = [float(main.grad.flatten()[0]) for main in mains if main is not None and main.grad is not None]
    assert found == [2.0, 4.0, 2.0]


# ---- a weight on two stages


class TiedStages(nn.Module):
    """The embedding on the first stage, the same weight as output projection on the last, and a layer on each."""

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(70, WIDTH, generator=generator))
        layers = torch.randn(2, WIDTH, WIDTH, generator=generator)
        self.first = mesh.rank("pipeline") == 0
        self.layer = nn.Parameter(layers[mesh.rank("pipeline")].clone())
        set_tied(self, "embedding")

    def losses(self) -> Losses:
        def loss(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            tokens, rows = torch.randint(70, (4,), generator=generator), torch.randn(4, WIDTH, generator=generator)
            if self.first:
                return linear(nn.functional.embedding(tokens, self.embedding), self.layer).square().mean()
            return linear(linear(rows, self.layer), self.embedding).square().mean()

        return [[lambda seed=seed: loss(seed)] for seed in range(3)]  # type: ignore[misc]


def train_tied(shard: bool) -> tuple[Tensor, Tensor, float, Tensor, int]:
    """Whole gradients of the tied weight and of the layer, the global norm, the weight after two steps, the state."""
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2))
    module = TiedStages(mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    reducer = GradientReducer(module, mesh, 1, MainParams([optimizer]), shard=shard, queue=WeightGradQueue())
    for number in range(2):
        run_step(reducer, module.losses())
        optimizer.zero_grad()
        reducer.finish()
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own = [grad for parameter in held if (grad := reducer.own_grad(parameter)) is not None]
        norm = float(global_grad_norm(own, mesh, torch.device("cpu")))
        grad, layer = reducer.full_grad(module.embedding), reducer.full_grad(module.layer)
        assert grad is not None
        assert layer is not None
        if number == 0:
            begun = grad.clone(), layer.clone(), norm
        optimizer.step()
    elements = sum(optimizer.state[parameter]["exp_avg"].numel() for parameter in held)
    return *begun, module.embedding.detach().clone(), elements


def train_tied_both_ways() -> list[Any]:
    return [train_tied(shard) for shard in (False, True)]


def alone(rank: int) -> tuple[Tensor, Tensor]:
    """Gradients of one stage by itself."""
    module = TiedStages(ParallelMesh(ParallelConfig(pipeline=2, data=1), rank))
    for [loss] in module.losses():
        loss().backward()
    assert module.embedding.grad is not None
    assert module.layer.grad is not None
    return module.embedding.grad, module.layer.grad


def test_a_weight_on_two_stages(ranks: RankPool) -> None:
    """Both have the sum of their gradients, take equal steps, count it once in the norm, and divide its state."""
    (lookup, first), (projection, last) = alone(0), alone(1)
    norm = torch.cat([(lookup + projection).flatten(), first.flatten(), last.flatten()]).double().norm()
    results = ranks.run(2, train_tied_both_ways)
    for rank, of_rank in enumerate(results):
        for sharded, (grad, layer, found, weight, elements) in enumerate(of_rank):
            torch.testing.assert_close(grad, lookup + projection, rtol=1e-6, atol=1e-7)
            assert torch.equal(grad, results[0][0][0])
            torch.testing.assert_close(layer, (first, last)[rank], rtol=1e-6, atol=1e-7)
            assert found == pytest.approx(float(norm), rel=1e-6)
            assert torch.equal(weight, results[0][0][3])
            assert sharded or elements == 70 * WIDTH + WIDTH**2
    assert sum(of_rank[1][4] for of_rank in results) == 70 * WIDTH + 2 * WIDTH**2
