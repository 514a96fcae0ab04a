"""Models whose blocks are spread over pipeline stages, in the strategy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.gradients import GradientReducer
from lightning_moe.parallel.layout import Axis, rank_lists
from lightning_moe.parallel.mesh import ParallelMesh
from lightning_moe.pipeline.copy_transport import CopyTransport, can_map_peers
from lightning_moe.pipeline.engine import PipelineEngine, StepTotals
from lightning_moe.pipeline.parts import ModelPart
from lightning_moe.pipeline.placement import Placement
from lightning_moe.pipeline.planning import costs_of, parts_of, schedule_of
from lightning_moe.pipeline.registry import make_schedule
from lightning_moe.pipeline.schedule import Schedule
from lightning_moe.pipeline.spec import Microbatch, PipelineSpec, ScheduleResult
from lightning_moe.pipeline.splitting import Split, pad_with_idle, split_batch
from lightning_moe.pipeline.totals import TotalsReduction, share_outputs
from lightning_moe.pipeline.transport import P2PTransport, Transport
from lightning_moe.strategy.checkpointed import CheckpointedStrategy
from lightning_moe.strategy.schedule_loss import ScaleCheck, loss_that_delivers
from lightning_moe.weight_grad.queue import WeightGradQueue

_MARK = "_lightning_moe_pipeline"


@dataclass(frozen=True)
class _Built:
    """What is known of a module that :meth:`PipelinedStrategy.build_pipeline` has built."""

    parts: tuple[ModelPart, ...]
    placement: Placement
    num_blocks: int
    split: Split | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Built:
        return self


class PipelinedStrategy(CheckpointedStrategy):
    """A strategy that runs models which describe themselves by a :class:`~lightning_moe.pipeline.spec.PipelineSpec`.

    Args:
        pipeline: Schedule and microbatches; the defaults when left out and there is more than one stage.

    Takes the other arguments of :class:`~lightning_moe.strategy.ranks.MeshStrategy`.

    Raises:
        ConfigError: There is no such schedule, or not for so many ranks and microbatches.
    """

    def __init__(self, *args: Any, pipeline: PipelineConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipeline = pipeline
        self._reducer: GradientReducer | None = None
        self._queue: WeightGradQueue | None = None
        self._fills_waits = False
        self._schedules: dict[int, Schedule] = {}
        self._transport: Transport | None = None
        self._connected: tuple[ParallelMesh, Placement] | None = None
        self._totals: dict[tuple[bool, bool], TotalsReduction] = {}
        self._has_run = False
        self._scale_check = ScaleCheck()
        if self.is_pipelined:
            self._plan()

    @property
    def is_pipelined(self) -> bool:
        """Whether models are built and run by parts: with several stages, or with a ``PipelineConfig``."""
        return self.pipeline is not None or self.parallel.pipeline > 1

    def build_pipeline(self, spec: PipelineSpec) -> nn.Module:
        """Build the parts of a model that this rank holds; call it in ``configure_model``.

        Args:
            spec: Describes the model.

        Returns:
            The module, to be assigned to an attribute of the LightningModule.

        Raises:
            ConfigError: The blocks cannot be divided among the stages as is wanted.
        """
        self._plan(spec.num_blocks)
        parts = self._own_parts(spec)
        model = spec.build(parts)
        model.__dict__[_MARK] = _Built(parts, self._planned.placement, spec.num_blocks, spec.split)
        return model

    def run_schedule(self, batch: Any, context: Any = None, *, outputs: bool = False) -> ScheduleResult:
        """Run all microbatches of a batch through the pipeline; forward only except in ``training_step``.

        A collective call of the ranks of a pipeline, all of which must bring the same batch.

        Args:
            batch: Tensors in any nesting, with samples along dim 0.
            context: Handed to all microbatches.
            outputs: Whether the predictions of the last part are wanted, on all ranks; forward only.

        Returns:
            Loss, metrics and predictions, the same on all ranks of the pipeline. In training ``training_step`` must
            return the loss as it is, or what it calculates from it with a derivative of one.

        Raises:
            ConfigError: The batch cannot be cut, the schedule has run for this ``training_step`` already, or the module
                optimizes by hand.
        """
        model, built = self._pipelined_model()
        assert self.lightning_module is not None
        predicting = self.lightning_module.trainer.state.fn == TrainerFn.PREDICTING
        wanted = self._settings.microbatches(self.parallel.pipeline)
        microbatches = split_batch(batch, wanted, built.split, context, predicting=predicting)
        if torch.is_grad_enabled() and self.lightning_module.trainer.training:
            return self._train(model, microbatches)
        # Always the same number: ranks that share experts may have batches of different sizes.
        wanted = max(wanted, len(microbatches))
        actions = self._schedule(wanted).ranks[self.mesh.rank(Axis.PIPELINE)]
        with self._transport_lost_by_errors():
            totals = self._engine(model).forward_step(actions, pad_with_idle(microbatches, wanted))
        result = self._reduce(totals, training=False)
        if outputs:
            result.outputs.extend(share_outputs(totals.outputs, self.mesh, self._last_rank))
        return result

    # ---- training

    def _train(self, model: nn.Module, microbatches: list[Microbatch]) -> ScheduleResult:
        if self._has_run:
            raise ConfigError(
                "run_schedule", "called twice in a training_step", "one call", "join what you train on in one batch"
            )
        self._has_run = True
        self._scale_check.read()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        reducer = self._reducer
        assert reducer is not None, "Lightning sets the strategy up first"
        accumulated = trainer.accumulate_grad_batches
        if not self.lightning_module.automatic_optimization:
            raise ConfigError(
                "automatic_optimization",
                False,
                "True with a pipeline",
                "gradients start over where Lightning's loop zeroes them",
            )
        loss_grad = torch.ones((), dtype=torch.float64, device=self.root_device) / accumulated
        plugin = self.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            loss_grad = plugin.scaler.scale(loss_grad)
        actions = self._schedule(len(microbatches)).ranks[self.mesh.rank(Axis.PIPELINE)]
        # Lightning zeroes gradients after training_step; see the note in schedule_loss.py.
        reducer.begin_schedule(fresh=trainer.fit_loop.epoch_loop.batch_idx % accumulated == 0)
        with self._transport_lost_by_errors():
            totals = self._engine(model).train_step(actions, microbatches, loss_grad, reducer)
        reducer.end_schedule()
        result = self._reduce(totals, training=True)
        loss = loss_that_delivers(result.loss, partial(self._deliver, reducer, loss_grad))
        return ScheduleResult(loss, result.metrics)

    def _deliver(self, reducer: GradientReducer, expected: Tensor, grad: Tensor) -> None:
        if not reducer.holds_schedule:
            raise ConfigError(
                "run_schedule",
                "a second backward pass through its loss",
                "one",
                "the schedule has computed the gradients once, and they have been handed out",
            )
        self._scale_check.take(grad, expected)
        torch.autograd.Variable._execution_engine.queue_callback(reducer.finish)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._has_run = False
        output = super().training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self._has_run and loss is None:
            raise ConfigError(
                "training_step",
                None,
                "the loss that run_schedule returns",
                "its gradients are computed already; what is to be skipped must be skipped before run_schedule",
            )
        return output

    @contextmanager
    def _transport_lost_by_errors(self) -> Iterator[None]:
        """What was under way when a step ended in an exception would be taken for tensors of the next fit."""
        try:
            yield
        except BaseException:
            self._connected = None
            raise

    # ---- parts

    @property
    def _settings(self) -> PipelineConfig:
        return self.pipeline or PipelineConfig()

    def _schedule(self, microbatches: int) -> Schedule:
        """The schedule for a number of microbatches; a batch may be cut into fewer of them than is wanted."""
        if microbatches not in self._schedules:
            settings, placement = self._settings, self._planned.placement
            make = partial(
                make_schedule,
                ranks=placement.ranks,
                microbatches=microbatches,
                chunks=placement.chunks,
                max_lag=settings.max_lag,
                costs=costs_of(settings),
            )
            schedule = make(settings.schedule, memory_limit=settings.memory_limit)
            if schedule.placement != placement:  # auto has chosen another; the ranks hold the stages of the planned one
                schedule = make(self._planned.name)
            self._schedules[microbatches] = schedule
        return self._schedules[microbatches]

    def _plan(self, num_blocks: int | None = None) -> None:
        planned = schedule_of(self._settings, self.parallel.pipeline, num_blocks)
        self._schedules = {planned.microbatches: planned}

    @property
    def _planned(self) -> Schedule:
        return next(iter(self._schedules.values()))

    @property
    def _last_rank(self) -> int:
        placement = self._planned.placement
        return placement.location(placement.num_stages - 1)[0]

    def _own_parts(self, spec: PipelineSpec) -> tuple[ModelPart, ...]:
        mesh = self.mesh
        placement = self._planned.placement
        if mesh.size(Axis.PIPELINE) != placement.ranks:  # the whole model, in the main process of spawn
            return (ModelPart.whole(spec.num_blocks),)
        parts = parts_of(
            self._settings,
            placement.num_stages,
            spec.num_blocks,
            block_costs=spec.block_costs,
            embed_cost=spec.embed_cost,
            head_cost=spec.head_cost,
        )
        rank = mesh.rank(Axis.PIPELINE)
        return tuple(parts[placement.stage(rank, chunk)] for chunk in range(placement.chunks))

    def _pipelined_model(self) -> tuple[nn.Module, _Built]:
        assert self.lightning_module is not None
        found = [module for module in self.lightning_module.modules() if _MARK in module.__dict__]
        if len(found) != 1:
            raise ConfigError(
                "configure_model",
                f"{len(found)} modules made by build_pipeline",
                "one",
                "assign self.trainer.strategy.build_pipeline(self.pipeline_spec()) to an attribute",
            )
        return found[0], found[0].__dict__[_MARK]

    def _engine(self, model: nn.Module) -> PipelineEngine:
        assert self._queue is not None
        return PipelineEngine(
            model,  # type: ignore[arg-type]  # it has been built as one
            self.mesh.rank(Axis.PIPELINE),
            self._planned.placement,
            self._transport,
            self._queue,
            self.root_device,
            dynamic_shapes=self._settings.dynamic_shapes,
            forward_context=self.precision_plugin.forward_context,
            defer_fused=self._fills_waits,
        )

    def _reduce(self, totals: StepTotals, *, training: bool) -> ScheduleResult:
        assert self.lightning_module is not None
        key = training, self.lightning_module.trainer.state.fn == TrainerFn.PREDICTING
        if key not in self._totals:
            self._totals[key] = TotalsReduction(self.mesh)
        return self._totals[key](totals)

    # ---- life

    def _set_up_pipeline(self) -> None:
        """Check what stages of the model there are, once it is built, and connect them; a collective call."""
        self._check_parts()
        if not self.is_pipelined:
            return
        megabytes = self._settings.weight_grad_megabytes
        self._queue = WeightGradQueue(None if megabytes is None else int(megabytes * 2**20))
        self._totals, self._scale_check = {}, ScaleCheck()
        if self.mesh.size(Axis.PIPELINE) == 1:
            return
        self._pipelined_model()
        placement = self._planned.placement
        # Where a step has failed on one rank, all connect anew.
        if not self._all(self._connected == (self.mesh, placement)):
            self._transport, self._connected = self._connect(), (self.mesh, placement)

    def _check_parts(self) -> None:
        """Refuse a model that the strategy of another Trainer has cut in another way: its ranks hold other parts."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            built: _Built | None = module.__dict__.get(_MARK)
            if built is None or (built.placement.ranks == 1 and not self.is_pipelined):
                continue
            if self.is_pipelined and built.placement != self._planned.placement:
                self._plan(built.num_blocks)
            placement = self._planned.placement if self.is_pipelined else None
            if built.placement != placement:
                raise ConfigError(
                    "configure_model",
                    f"a module with stages for {built.placement}",
                    "a whole module" if placement is None else f"one for {placement}",
                    "build a new module for another pipeline, and load the weights from a checkpoint",
                )

    def _connect(self) -> Transport:
        placement, device = self._planned.placement, self.root_device
        pipelines, wanted = rank_lists(self.mesh.config, Axis.PIPELINE), self._settings.transport
        group = self.mesh.group(Axis.PIPELINE)
        assert group is not None
        if wanted != "p2p" and self._all(can_map_peers(group, device)):
            return CopyTransport(placement, pipelines, device, self._timeout, group)
        if wanted == "copy":
            raise ConfigError(
                "pipeline.transport",
                wanted,
                "p2p or auto here",
                "copying needs GPUs of one host that reach each other's memory, for all ranks of a pipeline",
            )
        return P2PTransport(placement, pipelines, device, self._timeout)

    def _all(self, condition: bool) -> bool:
        verdict = torch.tensor(int(condition), device=self.root_device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        return bool(verdict.item())

    @override
    def setup_environment(self) -> None:
        if self.is_pipelined:
            # Each edge has a stream. CUDA puts streams beyond 8 into the queues of others, where work that waits for
            # another rank would hold up what that rank waits for.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        super().setup_environment()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_transport": None,
            "_connected": None,
            "_queue": None,
            "_totals": {},
            "_reducer": None,
            "_scale_check": ScaleCheck(),
        }
