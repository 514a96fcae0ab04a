"""What of a run goes into its checkpoints, and comes back out of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moe.checkpoint import contents
from lightning_moe.checkpoint.stages import Stages
from lightning_moe.errors import ConfigError
from lightning_moe.parallel.main_params import MainParams
from lightning_moe.parallel.rng import AxisRng
from lightning_moe.parallel.state import broadcast_buffers
from lightning_moe.strategy.checkpoints import RunCheckpoints, are_linked, local_path
from lightning_moe.strategy.ranks import MeshStrategy
from lightning_moe.strategy.resume import ExactResume, gather


class CheckpointedStrategy(MeshStrategy):
    """A strategy whose model, optimizers and random states are spread over ranks, in its checkpoint hooks.

    Takes the arguments of :class:`MeshStrategy`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mains = MainParams()
        self._loaded_main_weights: dict[str, Tensor] = {}
        self._checkpoints = RunCheckpoints()
        self._resume = ExactResume()
        self._rng: AxisRng | None = None

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # loading needs this rank's ShardSpecs

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._mains.wait()
        return super().lightning_module_state_dict()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._mains.wait()  # a gather under way would write over what is loaded
        super().load_model_state_dict(checkpoint, strict)
        # Not loaded yet: weight averaging puts the average into the model first, and the weights a little later.
        self._loaded_main_weights = checkpoint.get(contents.MAIN_WEIGHTS, {})

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise ConfigError(
                "storage_options", storage_options, "None", "sharded checkpoints do not use a CheckpointIO"
            )
        if not self.ranks_are_together():
            rank_zero_warn(f"{filepath} is not saved: not all ranks have stopped at this step.", stacklevel=2)
            return
        assert self.lightning_module is not None
        path = self.broadcast(local_path(filepath))
        own, linked = None, False
        if self._mesh is not None:  # there is none in the main process of spawn, whose module has no trainer either
            trainer = self.lightning_module.trainer
            broadcast_buffers(self.lightning_module, self._mesh)  # the checkpoint's tensors share the module's memory
            own, linked = self._resume.capture(checkpoint, trainer, self._rng, self._mesh), are_linked(trainer)
        state, meta = contents.pack(
            checkpoint, self.lightning_module, self._plain_optimizers(), self._mains.by_main, self._mesh
        )
        step = checkpoint["global_step"]
        self._checkpoints.save(path, state, meta, partial(gather, own), step, at_once=linked)

    def wait_for_checkpoints(self) -> None:
        """Wait until every checkpoint that was saved is on disk; a collective call.

        Raises:
            CheckpointError: One of them could not be written.
        """
        self._checkpoints.wait()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        path = self.broadcast(local_path(checkpoint_path))
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self._plain_optimizers() if fitting else []
        mains = self._mains.by_main if fitting else {}
        stages, strict = Stages.gather(module, optimizers, mains, self._mesh), module.strict_loading
        if path.is_file():
            whole = super().load_checkpoint(path, weights_only)

            def cut() -> dict[str, Any]:
                return contents.localize(whole, module, optimizers, mains, path=path, strict=strict, stages=stages)

            loaded = self._checkpoints.agree(path, cut)
        else:
            checkpoint = self._checkpoints.open(path)
            path = checkpoint.path

            def plan() -> dict[str, Any]:
                return contents.targets(
                    checkpoint.metadata, module, optimizers, mains, path=path, strict=strict, stages=stages
                )

            # Stages of a pipeline hold different parameters: what one of them finds wrong, all have to hear of.
            state = self._checkpoints.agree(path, plan)
            checkpoint.read(state)
            meta = checkpoint.meta(weights_only)
            self.barrier()  # somebody may remove the checkpoint next

            def put_together() -> dict[str, Any]:
                return contents.unpack(state, meta, module, optimizers, mains, path=path, stages=stages)

            loaded = self._checkpoints.agree(path, put_together)
        if fitting:
            self._resume.take(loaded, self.mesh)
        return loaded

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            self._checkpoints.remove(local_path(filepath))

    def _plain_optimizers(self) -> list[Optimizer]:
        plain = [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.optimizers]
        return [optimizer for optimizer in plain if not isinstance(optimizer, _MockOptimizer)]
