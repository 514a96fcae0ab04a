"""The Lightning strategy: ``Trainer(strategy=MoEStrategy(...))``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moe.config.overlap import OverlapConfig
from lightning_moe.config.parallel import ParallelConfig
from lightning_moe.config.pipeline import PipelineConfig
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.grad_norm import global_grad_norm
from lightning_moe.parallel.gradients import GradientReducer
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.main_params import MainParams
from lightning_moe.parallel.rng import AxisRng, fold_seed
from lightning_moe.parallel.state import (
    broadcast_buffers,
    broadcast_replicas,
    gather_full_state_dict,
)
from lightning_moe.strategy.checkpoints import RunCheckpoints
from lightning_moe.strategy.checks import (
    check_callbacks,
    check_evaluation_lengths,
    check_finetuning,
    check_optimizers,
    check_same_batch,
    check_shards,
    check_training_lengths,
)
from lightning_moe.strategy.elementwise import check_elementwise
from lightning_moe.strategy.evaluation import serve_after_last_batch
from lightning_moe.strategy.expert_layers import spread_experts, update_expert_biases
from lightning_moe.strategy.launcher import ShardedMultiProcessingLauncher
from lightning_moe.strategy.overlap import WaitForWeights, forward_alone_reads_weights
from lightning_moe.strategy.overlapped import LayerOverlap
from lightning_moe.strategy.pipelined import PipelinedStrategy
from lightning_moe.strategy.precision import globalize
from lightning_moe.strategy.ranks import StartMethod
from lightning_moe.strategy.sizes import report_sizes
from lightning_moe.strategy.substitutes import substitute_callbacks


class MoEStrategy(PipelinedStrategy):
    """Pipeline, expert, tensor, context and data parallelism for a LightningModule.

    Parameters with a :class:`~lightning_moe.parallel.sharding.ShardSpec` (those of
    :class:`~lightning_moe.moe.MoELayer` and of the parallel layers have one) are split over ranks, all others are held
    whole. Build this rank's part in ``configure_model`` from ``self.trainer.strategy.mesh``, or build whole MoE layers
    in ``__init__`` and let the strategy keep this rank's experts.

    Ranks along ``data`` see different samples; those along ``context`` and ``tensor`` get the same batch and share the
    work on it. The expert axes lie across them. Gradients are those of the mean loss over the ranks of ``data`` and
    ``context``, equal to a single process on the global batch.

    With ``pipeline`` > 1 the module describes its network by a :class:`~lightning_moe.pipeline.spec.PipelineSpec`,
    builds it with :meth:`build_pipeline` in ``configure_model`` and runs it with :meth:`run_schedule` in its steps; any
    module works with the other axes.

    Args:
        parallel: Sizes of the parallel axes; all ranks data-parallel when left out.
        pipeline: Schedule and microbatches of the pipeline; its defaults when left out.
        overlap: How expert and attention layers exchange tokens while they compute (see the note at the head of
            :mod:`lightning_moe.strategy.overlapped`); when left out they wait for one all-to-all each way.
        start_method: How to start ranks that no external launcher (torchrun, SLURM) has started.
        process_group_backend: ``"nccl"``, ``"gloo"``, ...; by default the one for the device.
        timeout_seconds: Seconds after which a collective gives up.
        bucket_megabytes: Size of a gradient bucket in MiB.
        optimizer_sharding: Whether optimizers step shards of the parameters (ZeRO stage 1): ranks that hold the same
            parameters divide the optimizer's state and work among themselves. The optimizer must treat every element by
            itself; False keeps whole parameters, for those that do not, such as Muon.
        async_checkpoint: Whether training goes on while checkpoints are written from a copy in host memory; not with
            ``ModelCheckpoint(save_last="link")``, which needs them on disk.
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: Set by the Trainer.
        checkpoint_io: Used for whole-file checkpoints only; sharded ones are written by torch DCP.
        precision_plugin: Set by the Trainer.

    Raises:
        ConfigError: A value is out of range, or there is no such schedule for so many stages and microbatches.
    """

    def __init__(
        self,
        parallel: ParallelConfig | None = None,
        pipeline: PipelineConfig | None = None,
        overlap: OverlapConfig | None = None,
        start_method: StartMethod = "popen",
        process_group_backend: str | None = None,
        timeout_seconds: float = 1800.0,
        bucket_megabytes: float = 25.0,
        optimizer_sharding: bool = True,
        async_checkpoint: bool = False,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            parallel or ParallelConfig(),
            start_method,
            process_group_backend,
            timeout_seconds,
            pipeline=pipeline,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        if bucket_megabytes <= 0:
            raise ConfigError("bucket_megabytes", bucket_megabytes, "a positive number of MiB", "25 suits most links")
        self.overlap = overlap
        self._layer_overlap = LayerOverlap(overlap)
        self._bucket_bytes = int(bucket_megabytes * 2**20)
        self._optimizer_sharding = optimizer_sharding
        self._async_checkpoint = async_checkpoint
        self._batch_checked = False
        self._trained_weights: dict[str, Any] = {}

    # ---- model and optimizers

    @override
    def setup_environment(self) -> None:
        mesh_before = self._mesh
        super().setup_environment()
        assert self.lightning_module is not None
        check_callbacks(self.lightning_module.trainer, self.mesh)
        substitute_callbacks(self.lightning_module.trainer, self.mesh)
        if self.mesh is not mesh_before:
            group = dist.new_group(backend="gloo", timeout=self._timeout, group_desc="checkpoint")
            self._checkpoints = RunCheckpoints(group, background=self._async_checkpoint)
        self._checkpoints.start()
        # Before callbacks copy the module: weight averaging keeps this rank's experts.
        spread_experts(self.lightning_module, self.mesh)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self._set_up_pipeline()
        spread_experts(trainer.lightning_module, self.mesh)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None:
            self.model = self._layer_sync.apply(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        broadcast_replicas(self.model, self.mesh)
        context = self.precision_plugin.forward_context
        self._fills_waits = self._layer_overlap.set_up(self.model, self.mesh, self._queue, context)
        if trainer.state.fn == TrainerFn.FITTING:
            check_shards(trainer.lightning_module, self.mesh)
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            optimizers = self._plain_optimizers()
            check_optimizers(optimizers, trainer.lightning_module, self.mesh)
            self._mains = MainParams(optimizers)
            self._reducer = GradientReducer(
                self.model,
                self.mesh,
                self._bucket_bytes,
                self._mains,
                shard=self._optimizer_sharding,
                queue=self._queue,
            )
            for optimizer in optimizers:
                if self._mains.shards(optimizer):
                    check_elementwise(optimizer, self._mains.by_main)
            check_finetuning(trainer, self._mains)
            if forward_alone_reads_weights(trainer):
                self._mains.overlap_with(trainer.lightning_module)
                trainer.callbacks.insert(0, WaitForWeights(self._mains))  # type: ignore[attr-defined]
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
            report_sizes(trainer.lightning_module, self.mesh)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # The Trainer fills the plugin in only where it is still None.
        self._precision_plugin = None if plugin is None else globalize(plugin)

    @override
    def setup_precision_plugin(self) -> None:
        self.precision_plugin.clip_by_global_norm = self._clip_by_global_norm  # type: ignore[attr-defined]
        super().setup_precision_plugin()

    # ---- training

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        reducer = self._reducer
        if reducer is None or not closure_loss.requires_grad or reducer.holds_schedule:
            return
        reducer.arm()

        def finish_with_this_backward(_: Tensor) -> None:
            if not reducer.armed:  # the second loss.backward() of an overridden LightningModule.backward
                reducer.arm()
            # Runs when autograd has reached every parameter and before Lightning's on_after_backward.
            torch.autograd.Variable._execution_engine.queue_callback(reducer.finish)

        closure_loss.register_hook(finish_with_this_backward)

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        assert self._reducer is not None
        with self._reducer.no_sync():
            yield

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.lightning_module is not None
        update_expert_biases(self.lightning_module, self.mesh)
        return output

    def full_grad(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The reduced gradient of a parameter of the model, which a sharded optimizer keeps in parts.

        A collective call: all ranks must ask for the same parameters. Between backward and ``zero_grad`` only, e.g. in
        ``on_before_optimizer_step``.

        Returns:
            A tensor in the (local) shape of the parameter, of at least float32 where a main parameter is stepped; None
            if there is no gradient.
        """
        return parameter.grad if self._reducer is None else self._reducer.full_grad(parameter)

    def full_grads(self, parameters: Iterable[torch.nn.Parameter]) -> list[Tensor | None]:
        """:meth:`full_grad` of several parameters. What they have in common is gathered once, not for each.

        Returns:
            The gradients, which may share memory: do not write to them.
        """
        if self._reducer is None:
            return [parameter.grad for parameter in parameters]
        return self._reducer.full_grads(parameters)

    def _clip_by_global_norm(self, parameters: list[Tensor], max_norm: float) -> None:
        assert self._reducer is not None
        own = [grad for parameter in parameters if (grad := self._reducer.own_grad(parameter)) is not None]
        norm = global_grad_norm(own, self.mesh, self.root_device)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        check_training_lengths(trainer.num_training_batches, self.mesh)
        # Folding in the step keeps a resumed run from drawing the dropout masks of its beginning again.
        seed = fold_seed(self.broadcast(torch.initial_seed()), trainer.global_step)
        self._rng = AxisRng(self.mesh, seed)
        self._resume.start_training(trainer, self._rng)
        self._batch_checked = False
        self._mains.load(self._loaded_main_weights, self.lightning_module)
        self._loaded_main_weights = {}
        self._mains.refresh()  # hooks may have written weights since the optimizer was made

    @override
    def on_train_end(self) -> None:
        assert self.lightning_module is not None
        self._resume.end_training(self.lightning_module.trainer, self._rng, self.mesh)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._rng is not None, "Lightning calls on_train_start first"
        if not self._batch_checked:
            check_same_batch((args, kwargs), self.mesh)
            self._batch_checked = True
        self._mains.wait(marked=False)
        # Ranks are seeded alike, so that they build equal models; drawing dropout masks from these generators would
        # drop the same units of different samples on all of them.
        with self._rng.fork("replicated"):
            output = super().training_step(*args, **kwargs)
        self._mains.wait()  # for modules that this step has not called
        return output

    # ---- evaluation

    @override
    def on_validation_start(self) -> None:
        """Ranks evaluate one model, the one that a checkpoint keeps, and not each its own BatchNorm statistics."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            broadcast_buffers(self.lightning_module, self.mesh)
        self._mains.wait()
        self._resume.start_validation(self.lightning_module.trainer)

    @override
    def on_validation_end(self) -> None:
        assert self.lightning_module is not None
        self._resume.end_validation(self.lightning_module.trainer)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._serve_after(super().validation_step(*args, **kwargs))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._serve_after(super().test_step(*args, **kwargs))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._serve_after(super().predict_step(*args, **kwargs))

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        ranks_wait = self.mesh.config.model_size > 1 or self.mesh.size(Axis.EXPERT_MODEL) > 1
        if ranks_wait and not self.lightning_module.trainer.training:
            check_evaluation_lengths(dataloader, self.mesh)
        return self._resume.process_dataloader(dataloader, self.lightning_module.trainer)

    def _serve_after(self, output: Any) -> Any:
        assert self.lightning_module is not None
        serve_after_last_batch(self.lightning_module.trainer, self.mesh)
        return output

    # ---- the main process of spawn and fork

    def take_trained_weights(self) -> dict[str, Any]:
        """The whole model's weights after fit, on rank 0; hands them over once."""
        weights, self._trained_weights = self._trained_weights, {}
        return weights

    @override
    def teardown(self) -> None:
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        if trainer is not None:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, WaitForWeights)]
        if self._reducer is not None:
            self._reducer.close()
            self._reducer = None
        self._mains.close(wait=trainer is None or trainer.state.status != TrainerStatus.INTERRUPTED)
        if not self._checkpoints.unfinished or self.ranks_are_together():
            self._checkpoints.finish()
        if module is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            if self._layer_sync is not None:
                self.model = self._layer_sync.revert(module)
            # Not after an exception: one rank may have had it alone.
            if trainer.state.status == TrainerStatus.RUNNING:
                self._collect_trained_weights()
        super().teardown()

    def _collect_trained_weights(self) -> None:
        assert self.lightning_module is not None
        if isinstance(self._launcher, ShardedMultiProcessingLauncher):
            self._trained_weights = gather_full_state_dict(self.lightning_module, self.mesh)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reducer": None, "_mains": MainParams(), "_checkpoints": RunCheckpoints()}

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for name, start_method in (("moe", "popen"), ("moe_spawn", "spawn"), ("moe_fork", "fork")):
            strategy_registry.register(
                name, cls, description=f"MoEStrategy started by {start_method}", start_method=start_method
            )
