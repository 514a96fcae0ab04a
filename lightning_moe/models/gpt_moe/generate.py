"""Text from a GPT-MoE, token by token. B batch, S prompt length, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe.model import GPTMoEModel
from lightning_moe.models.gpt_moe.sampling import Sampling
from lightning_moe.parallel.layout import Axis
from lightning_moe.weight_grad import compute_dtype

NextLogits = Callable[[Tensor], Tensor]
"""From tokens ``[B, S]`` to the logits ``[B, V]`` of what follows them, the same on all ranks."""


@torch.no_grad()
def generate(
    model: GPTMoEModel,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    next_logits: NextLogits | None = None,
) -> Tensor:
    """Continue sequences; a collective call, with the same arguments on all ranks of the model's mesh.

    Args:
        model: The network; the modes (training or evaluation) of its modules are put back in the end.
        tokens: int64 ``[B, S]``, one document per sequence, none of them padded.
        max_new_tokens: Number of tokens to add to each.
        sampling: How they are drawn.
        seed: Seed of the draws; torch's default generators are left alone.
        next_logits: Runs the model, where this rank holds a part of it only; None for a whole model, which keeps the
            keys and values of earlier tokens.

    Returns:
        int64 ``[B, S + max_new_tokens]``, the same on all ranks.

    Raises:
        ConfigError: The prompt is not ``[B, S]`` or empty, or the sequences would be longer than the model is made for.
    """
    longest = model.config.max_sequence_length
    if tokens.dim() != 2:
        raise ConfigError("tokens", f"shape {tuple(tokens.shape)}", "[B, S]", "tokens[None] makes a batch of one")
    batch, length = tokens.shape
    if length < 1:
        raise ConfigError("tokens", f"shape {tuple(tokens.shape)}", "at least one token per sequence")
    if length > longest:
        raise ConfigError(
            "tokens", f"shape {tuple(tokens.shape)}", f"at most config.max_sequence_length = {longest} tokens"
        )
    if max_new_tokens < 0 or length + max_new_tokens > longest:
        raise ConfigError(
            "max_new_tokens",
            max_new_tokens,
            f"from 0 to {longest - length}: config.max_sequence_length = {longest} less {length} tokens of prompt",
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    sequences = [tokens.to(model.device)]
    # Every step has other shapes; compiling for each would take longer than all of them.
    with _evaluating(model), torch.compiler.set_stance("force_eager"):
        if next_logits is None:
            next_logits = _with_caches(model, batch, length + max_new_tokens)
        for _ in range(max_new_tokens):
            logits = next_logits(torch.cat(sequences, dim=1))
            sequences.append(_agreed(sampling.draw(logits, generator), model)[:, None])
    return torch.cat(sequences, dim=1)


def _with_caches(model: GPTMoEModel, batch: int, max_length: int) -> NextLogits:
    """Run a whole model on what has been added since the last call."""
    caches = model.new_caches(batch, max_length, compute_dtype(model.output_weight))

    def next_logits(tokens: Tensor) -> Tensor:
        return model.logits(tokens[:, caches[0].length :], caches=caches)[:, -1]

    return next_logits


def _agreed(tokens: Tensor, model: GPTMoEModel) -> Tensor:
    """The first rank's tokens, on every rank.

    Ranks with copies of the same tokens add up expert outputs of differently shaped products, whose last bits may
    differ. Where two tokens are almost equally likely, ranks could go on with different ones.
    """
    group = model.mesh.active_group(Axis.WORLD)
    if group is not None:
        dist.broadcast(tokens, src=0, group=group)
    return tokens


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and each back to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
