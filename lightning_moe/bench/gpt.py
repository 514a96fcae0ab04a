"""Tokens per second of a GPT-MoE under ``Trainer(strategy=MoEStrategy)``, on random tokens.

    torchrun --nproc_per_node=4 -m lightning_moe.bench.gpt --expert 4 --json
    torchrun --nproc_per_node=4 -m lightning_moe.bench.gpt --peer fsdp2 --json

The peer is Hugging Face's Qwen3-MoE of the same shape under FSDP2 (needs ``transformers``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_moe.bench.timing import StepClock, Times, kernel_seconds, occupancy_seconds, slowest_kernels
from lightning_moe.config import (
    GPTMoEConfig,
    MoEConfig,
    OptimizerConfig,
    OverlapConfig,
    ParallelConfig,
    PipelineConfig,
)
from lightning_moe.config.gpt_size import parameter_count
from lightning_moe.models.gpt_moe import GPTMoE
from lightning_moe.strategy import MoEStrategy

PEAK_FLOPS = 775e12
"""Dense bf16 rate of one H200 as measured, FLOP/s; utilisation is relative to it."""


def bench_config(sequence_length: int, num_layers: int = 8) -> GPTMoEConfig:
    """Qwen3-MoE blocks; with eight of them 2.63 B parameters, 0.51 B active."""
    return GPTMoEConfig(
        vocab_size=32768,
        hidden_size=2048,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=4,
        head_size=64,
        qk_norm="head",
        max_sequence_length=sequence_length,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=64, top_k=8, expert_hidden_size=768),
    )


def training_flops(active: int, config: GPTMoEConfig, sequence_length: int, tokens: int) -> float:
    """FLOPs of forward and backward: 6 per active parameter and token, and causal attention."""
    width = config.num_heads * (config.head_size or config.hidden_size // config.num_heads)
    return 6.0 * active * tokens + 12.0 * config.num_layers * width * sequence_length * tokens / 2


class RandomTokens(IterableDataset[dict[str, Tensor]]):
    """Endless batches of the same random tokens."""

    def __init__(self, batch: int, length: int, vocab_size: int) -> None:
        tokens = torch.randint(vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
        self.batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "label_bytes": torch.ones_like(tokens[:, 1:])}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch


class Measure(pl.Callback):
    """Times the steps after a warm-up, then profiles some more."""

    reads_weights = False

    def __init__(self, warmup: int, steps: int, profiled: int, listed: int) -> None:
        self.warmup, self.steps, self.profiled, self.listed = warmup, steps, profiled, listed
        self.clock: StepClock | None = None
        self.profile: torch.profiler.profile | None = None
        self.times: Times | None = None
        self.kernels: dict[str, float] = {}
        self.occupancy: dict[str, float] = {}
        self.slowest: dict[str, tuple[float, int]] = {}

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        done = trainer.global_step
        if done == self.warmup:
            self.clock = StepClock(pl_module.device)
        if self.clock is not None and self.warmup <= done <= self.warmup + self.steps:
            self.clock.mark()
        if done == self.warmup + self.steps:
            assert self.clock is not None
            self.times = self.clock.times()
            if self.profiled:
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profile.start()
        if self.profile is not None and done == self.warmup + self.steps + self.profiled:
            torch.cuda.synchronize()
            self.profile.stop()
            self.kernels = kernel_seconds(self.profile, self.profiled)
            self.occupancy = occupancy_seconds(self.profile, self.profiled)
            self.slowest = slowest_kernels(self.profile, self.profiled, self.listed)
            self.profile = None


def measure_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Train on random tokens and report; called on every rank."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = ParallelConfig(
        pipeline=options.pipeline,
        context=options.context,
        tensor=options.tensor,
        expert=options.expert,
        expert_tensor=options.expert_tensor,
    )
    pipeline = None
    if options.schedule is not None:
        pipeline = PipelineConfig(
            schedule=options.schedule,
            num_microbatches=options.microbatches,
            chunks=options.chunks,
            transport=options.transport,
        )
    config = bench_config(options.sequence, options.layers)
    measure = Measure(options.warmup, options.steps, options.profile, options.kernels)
    overlap = None if options.overlap is None else OverlapConfig(dispatch=options.overlap)
    strategy = MoEStrategy(
        parallel,
        pipeline,
        overlap=overlap,
        bucket_megabytes=options.bucket_megabytes,
        optimizer_sharding=options.optimizer_sharding,
    )
    trainer = quiet_trainer(options, strategy, options.warmup + options.steps + options.profile, measure)
    module = GPTMoE(
        config,
        OptimizerConfig(learning_rate=1e-4, warmup_steps=0),
        activation_checkpointing=options.checkpointing,
        loss_chunk_tokens=options.loss_chunk,
        compile_blocks=options.compile,
    )
    data = RandomTokens(options.batch, options.sequence, config.vocab_size)
    trainer.fit(module, DataLoader(data, batch_size=None))
    assert measure.times is not None
    axes = f"pipeline={options.pipeline} context={options.context} tensor={options.tensor} expert={options.expert}"
    name = f"GPTMoE, {axes}" + (f", {options.schedule}" if options.schedule else "")
    name += f", overlap {options.overlap}" if options.overlap else ""
    data_ranks = world_size // (options.pipeline * options.context * options.tensor)
    tokens = options.batch * options.sequence * data_ranks
    result = figures(name, config, options, tokens, world_size, measure.times)
    result["milliseconds_by_kernel"] = {kind: round(1e3 * seconds, 2) for kind, seconds in measure.kernels.items()}
    result["milliseconds_of_device"] = {kind: round(1e3 * seconds, 2) for kind, seconds in measure.occupancy.items()}
    if options.kernels:
        result["slowest_kernels"] = {name: (round(1e3 * s, 2), n) for name, (s, n) in measure.slowest.items()}
    return result


def figures(
    name: str, config: GPTMoEConfig, options: argparse.Namespace, tokens: int, world_size: int, times: Times
) -> dict[str, Any]:
    """The figures that both contestants report."""
    total, active = parameter_count(config)
    cuda = torch.cuda.is_available()
    flops = training_flops(active, config, options.sequence, tokens)
    return {
        "name": name,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "ranks": world_size,
        "precision": options.precision,
        "parameters": total,
        "active_parameters": active,
        "global_tokens_per_step": tokens,
        "step_milliseconds": {"median": 1e3 * times.median, "min": 1e3 * times.low, "max": 1e3 * times.high},
        "steps": times.count,
        "tokens_per_second_per_rank": tokens / times.median / world_size,
        "utilization_of_775_tflops": flops / times.median / world_size / PEAK_FLOPS,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def quiet_trainer(
    options: argparse.Namespace, strategy: MoEStrategy, max_steps: int, measure: pl.Callback
) -> pl.Trainer:
    """A Trainer that does nothing beside training and measuring, with all generators seeded."""
    pl.seed_everything(0)
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=strategy,
        precision=options.precision,
        max_steps=max_steps,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def print_result(result: dict[str, Any], *, on_one_line: bool) -> None:
    """Print a result as JSON on rank 0, and leave the process group."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result, indent=None if on_one_line else 2), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and print one JSON object as the last line of rank 0."""
    parser = argparse.ArgumentParser(prog="python -m lightning_moe.bench.gpt", description=__doc__)
    parser.add_argument("--peer", choices=["fsdp2"], help="measure this peer instead of our strategy")
    for axis in ("pipeline", "context", "tensor", "expert", "expert_tensor"):
        parser.add_argument(f"--{axis.replace('_', '-')}", type=int, default=1)
    parser.add_argument("--schedule", help="run the batch through this pipeline schedule")
    parser.add_argument("--microbatches", type=int, help="microbatches of the batch; twice the pipeline if left out")
    parser.add_argument("--chunks", type=int, help="stages that each rank holds")
    parser.add_argument("--transport", choices=["auto", "p2p", "copy"], default="auto")
    parser.add_argument("--overlap", choices=["auto", "p2p"], help="hide the experts' exchange; if left out, wait")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    parser.add_argument("--batch", type=int, default=4, help="sequences per data rank")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", type=int, default=0, help="steps to profile after the timed ones")
    parser.add_argument("--kernels", type=int, default=0, help="kernels of the profile to list by name")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--loss-chunk", type=int, default=4096, help="tokens whose logits exist at a time")
    parser.add_argument("--bucket-megabytes", type=float, default=100.0)
    parser.add_argument("--optimizer-sharding", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    options = parser.parse_args(arguments)
    if options.peer:
        from lightning_moe.bench.fsdp_peer import measure_fsdp2

        result = measure_fsdp2(options)
    else:
        result = measure_ours(options)
    print_result(result, on_one_line=options.json)


if __name__ == "__main__":
    main()
