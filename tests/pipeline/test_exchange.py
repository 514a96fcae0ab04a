"""What stages send each other arrives as it was, whatever it is."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moe import ConfigError, ParallelConfig, ParallelMesh
from lightning_moe.pipeline.engine import PipelineEngine, StepTotals
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.spec import Carry, Microbatch, PartOutput
from lightning_moe.pipeline.splitting import split_batch
from lightning_moe.pipeline.totals import TotalsReduction, share_outputs
from lightning_moe.pipeline.transport import Edge, P2PTransport, TensorSpec
from lightning_moe.weight_grad.queue import WeightGradQueue
from tests.distributed import RankPool


def odd_tensors() -> list[Tensor]:
    values = torch.arange(24.0).view(2, 3, 4)
    return [
        values.transpose(0, 2),
        values[:, 1:, 1],
        values[0, 0].expand(2, 4),
        values.requires_grad_() * 2,
        torch.zeros(0, 5, dtype=torch.int64),
        torch.tensor(-7, dtype=torch.int16),
        torch.tensor([True, False, True]),
        torch.tensor([1 + 2j, 3j]),
        torch.arange(9, dtype=torch.uint8)[1:],
        torch.ones([1] * 8, dtype=torch.bfloat16),
    ]


def check_same(received: list[Tensor]) -> None:
    for tensor, expected in zip(received, odd_tensors(), strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def outputs_of(microbatch: int) -> dict[str, Any]:
    return {"odd": [tensor.detach() for tensor in odd_tensors()], "rest": (None, "name", {}), "number": microbatch}


def exchange() -> None:
    mesh = ParallelMesh.build(ParallelConfig(pipeline=2))
    first, cpu = mesh.global_rank == 0, torch.device("cpu")
    transport = P2PTransport(Placement(2, 1), [(0, 1)], cpu, timedelta(seconds=30))
    for edge in (Edge(0, "activation"), Edge(0, "gradient")):
        if first == (edge.kind == "activation"):
            tensors = odd_tensors()
            transport.send_specs(edge, [TensorSpec.of(tensor) for tensor in tensors])
            transport.send(edge, tensors)
            transport.finish()
        else:
            specs = transport.receive_specs(edge)
            assert [spec.requires_grad for spec in specs].count(True) == 1
            check_same(transport.receive(edge, specs).wait())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = share_outputs([] if first else [outputs_of(0), outputs_of(1)], mesh, 1)
    assert [each["number"] for each in shared] == [0, 1]
    for each in shared:
        assert each["rest"] == (None, "name", {})
        check_same(each["odd"])

    reduce = TotalsReduction(mesh)
    common = {"both": torch.tensor([1, 2]) + mesh.global_rank}
    totals = StepTotals(torch.tensor(float("nan") if first else 1.0, dtype=torch.float64), metrics=common)
    if not first:
        totals.metrics["last"] = torch.zeros(0, 2, dtype=torch.float64)
        totals.loss_dtype = torch.float64
    result = reduce(totals)
    assert result.loss.isnan()
    assert result.loss.dtype == torch.float64
    assert result.metrics["both"].tolist() == [3, 5]
    assert result.metrics["last"].shape == (0, 2)
    with pytest.raises(ConfigError, match=r"metrics\.both.*names, shapes and dtypes of the first step"):
        reduce(StepTotals(totals.loss, metrics={"both": torch.zeros(2)}))


def test_anything_arrives(ranks: RankPool) -> None:
    ranks.run(2, exchange)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([torch.zeros(1)] * 17, "17 tensors"),
        ([torch.zeros([1] * 9)], "9 dims"),
        ([torch.zeros(1, dtype=torch.float8_e5m2)], "float8_e5m2"),
    ],
    ids=["many", "dims", "dtype"],
)
def test_what_cannot_be_told_is_refused(tensors: list[Tensor], words: str) -> None:
    transport = object.__new__(P2PTransport)  # refused before anything is sent
    with pytest.raises(ConfigError, match=words):
        transport.send_specs(Edge(0, "activation"), [TensorSpec.of(tensor) for tensor in tensors])


class Model(nn.Module):
    """One part, which hands on what nobody takes."""

    def __init__(self, metric: Any) -> None:
        super().__init__()
        self.weight, self.metric = nn.Parameter(torch.ones(3)), metric

    def run_part(self, part: int, carry: Carry, microbatch: Microbatch) -> PartOutput:
        hidden = microbatch.data * self.weight
        return PartOutput((hidden,), hidden.sum(1).mean(), {"metric": self.metric})


class Listener:
    def start_pass(self, chunk: int, *, final: bool) -> None: ...

    def end_pass(self) -> None: ...


def train_step(metric: Any) -> tuple[Model, StepTotals]:
    model, schedule = Model(metric), make_schedule("1f1b", 1, 2)
    engine = PipelineEngine(model, 0, schedule.placement, None, WeightGradQueue(), torch.device("cpu"))
    batch = split_batch(torch.arange(6.0).view(2, 3), 2)
    return model, engine.train_step(schedule.ranks[0], batch, torch.ones(()), Listener())


def test_what_the_last_part_hands_on_has_no_gradient() -> None:
    model, totals = train_step(torch.tensor(2.0))
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [1.5, 2.5, 3.5]
    assert totals.metrics["metric"] == 4.0


def test_metrics_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.metric.*a tensor"):
        train_step(2.0)
