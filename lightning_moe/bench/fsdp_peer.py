"""The peer: Hugging Face's Qwen3-MoE under FSDP2, as its users run it (bf16 compute, float32 weights, fused AdamW)."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_moe.bench.gpt import bench_config, figures
from lightning_moe.bench.timing import StepClock, kernel_seconds


def measure_fsdp2(options: argparse.Namespace) -> dict[str, Any]:
    """Train on random tokens and report; called on every rank."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    ours = bench_config(options.sequence)
    assert ours.moe is not None
    shape: dict[str, Any] = {  # transformers' annotations lack some of its own arguments
        "hidden_size": ours.hidden_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "head_dim": ours.head_size,
        "moe_intermediate_size": ours.moe.expert_hidden_size,
        "num_experts": ours.moe.num_experts,
        "num_experts_per_tok": ours.moe.top_k,
        "vocab_size": ours.vocab_size,
        "max_position_embeddings": options.sequence,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    config = Qwen3MoeConfig(**shape)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with device:
        model = Qwen3MoeForCausalLM(config)
    mesh = init_device_mesh("cuda", (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(ours.vocab_size, (options.batch, options.sequence), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(options.warmup):
        step()
    clock = StepClock(device)
    clock.mark()
    for _ in range(options.steps):
        step()
        clock.mark()
    times = clock.times()
    kernels: dict[str, float] = {}
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(options.profile):
                step()
            torch.cuda.synchronize()
        kernels = kernel_seconds(profile, options.profile)
    total = options.batch * options.sequence * world_size
    return figures("Hugging Face Qwen3-MoE, FSDP2", ours, options, total, world_size, times) | {
        "milliseconds_by_kernel": {kind: round(1e3 * seconds, 2) for kind, seconds in kernels.items()}
    }
