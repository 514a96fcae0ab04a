"""Cutting a batch into microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_moe.errors import ConfigError
from lightning_moe.pipeline.spec import Microbatch

Split = Callable[[Any, int], list[Any]]

_HINT = "give PipelineSpec(split=...) a function that cuts your batches into microbatches"


def split_batch(
    batch: Any, count: int, split: Split | None = None, context: Any = None, *, predicting: bool = False
) -> list[Microbatch]:
    """Cut a batch into at most ``count`` microbatches, in the order of its samples.

    Sizes differ by at most one sample, the first ones being larger; a batch of fewer than ``count`` samples gives one
    microbatch for each.

    Args:
        batch: Tensors in any nesting of dicts, tuples and lists. What has the length of the batch (that of its first
            tensor with dims) is cut: tensors, lists without tensors, tuples of strings; everything else is given to
            all.
        count: Number of microbatches.
        split: Does the cutting in its own way, if given; all microbatches then count the same.
        context: Handed to all microbatches.
        predicting: Likewise.

    Raises:
        ConfigError: The batch has no samples, or none that can be cut; or it holds something of which it is not known
            whether it is to be cut; or ``split`` gives nothing.
    """
    if split is not None:
        pieces = split(batch, count)
        if not pieces:
            raise ConfigError("PipelineSpec.split", "no microbatches", "at least one for every batch")
        return [
            Microbatch(data, i, len(pieces), 1.0 / len(pieces), context, predicting) for i, data in enumerate(pieces)
        ]
    length = batch_length(batch)
    count = min(count, length)
    base, more = divmod(length, count)
    microbatches = []
    start = 0
    for i in range(count):
        stop = start + base + (i < more)
        data = _cut(batch, slice(start, stop), length)
        microbatches.append(Microbatch(data, i, count, (stop - start) / length, context, predicting))
        start = stop
    return microbatches


def pad_with_idle(microbatches: Sequence[Microbatch], count: int) -> list[Microbatch]:
    """Add copies of the first microbatch, with weight 0, so that there are ``count``.

    Ranks that share experts must call their layers equally often, and in the same order, in evaluation too.
    """
    idle = [replace(microbatches[0], index=index, count=count, weight=0.0) for index in range(len(microbatches), count)]
    return [*microbatches, *idle]


def batch_length(batch: Any) -> int:
    """Number of samples of a batch: the length of its first tensor that has dims.

    Raises:
        ConfigError: There is no such tensor, or no sample.
    """
    lengths = [leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    if not lengths or not lengths[0]:
        raise ConfigError(
            "batch",
            type(batch).__name__ if not lengths else "0 samples",
            "tensors with samples along dim 0",
            _HINT,
        )
    return lengths[0]


def _cut(value: Any, samples: slice, length: int) -> Any:
    if isinstance(value, Tensor):
        return value[samples] if value.dim() and value.shape[0] == length else value
    if isinstance(value, dict):
        part = copy(value)  # a defaultdict is not made from items
        for key, item in value.items():
            part[key] = _cut(item, samples, length)
        return part
    if isinstance(value, tuple):
        if value and len(value) == length and all(isinstance(item, str) for item in value):
            return value[samples]  # so Lightning's and torch's collate functions leave strings
        items = [_cut(item, samples, length) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if len(value) == length and not tensors:
            return value[samples]  # names, file paths, ...
        if len(value) == length and not any(tensor.dim() and tensor.shape[0] == length for tensor in tensors):
            raise _unclear(value, "a list as long as the batch, of tensors that are not")
        return [_cut(item, samples, length) for item in value]
    if _hides_tensors(value):
        raise _unclear(value, "tensors in a container that is no dict, tuple or list")
    return value


def _hides_tensors(value: Any) -> bool:
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _unclear(value: object, what: str) -> ConfigError:
    return ConfigError(
        f"batch: {type(value).__name__}",
        what,
        "tensors in dicts, tuples and lists, with samples along dim 0",
        _HINT,
    )
