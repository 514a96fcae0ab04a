"""Launching ranks from the main process, with the trained weights brought back whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _WorkerOutput
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_moe.parallel.state import load_full_state_dict

if TYPE_CHECKING:
    from lightning_moe.strategy.strategy import MoEStrategy


class ShardedMultiProcessingLauncher(_MultiProcessingLauncher):
    """``spawn`` and ``fork``: workers hold parts of the model, the main process gets all of it.

    Lightning sends rank 0's ``state_dict`` back and loads it leniently. That loses every expert of the other ranks, and
    all weights of a module that builds its layers in ``configure_model``: the main process has no layers to load into.
    """

    _strategy: MoEStrategy

    @override
    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> _WorkerOutput | None:
        output = super()._collect_rank_zero_results(trainer, results)
        if output is not None and output.weights_path is not None:
            torch.save(self._strategy.take_trained_weights(), output.weights_path)
        return output

    @override
    def _recover_results_in_main_process(self, worker_output: _WorkerOutput, trainer: pl.Trainer) -> None:
        if worker_output.weights_path is not None:
            weights = self._strategy.checkpoint_io.load_checkpoint(worker_output.weights_path)
            module = self._strategy.lightning_module
            assert module is not None
            # Lightning attaches modules in the workers only; configure_model asks the strategy for mesh and pipeline.
            module.trainer = trainer
            try:
                _load_whole_model(self._strategy, weights)
            finally:
                module.trainer = None
            self._strategy.checkpoint_io.remove_checkpoint(worker_output.weights_path)
            worker_output = worker_output._replace(weights_path=None)
        super()._recover_results_in_main_process(worker_output, trainer)


def _load_whole_model(strategy: MoEStrategy, weights: Mapping[str, Any]) -> None:
    """Load whole weights into the main process' module, building its layers first where they are missing.

    As in Lightning, what the module lacks is passed over: layers that ``setup`` builds exist in the workers only.
    """
    module = strategy.lightning_module
    assert module is not None
    with strategy.alone(), strategy.precision_plugin.module_init_context():
        module.configure_model()
    strategy.precision_plugin.convert_module(module)
    own = module.state_dict()
    if unknown := sorted(weights.keys() - own.keys()):
        rank_zero_warn(
            f"the main process' module has no {unknown}: their trained weights stay behind in the workers. "
            "Build layers in __init__ or configure_model, or save a checkpoint."
        )
    present = {name: value for name, value in weights.items() if name in own}
    load_full_state_dict(module, {**own, **present})
