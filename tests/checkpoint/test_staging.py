from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.shards import LogicalShard
from lightning_moe.checkpoint.staging import HostCopy
from lightning_moe.parallel.sharding import ShardSpec

SPECS = (ShardSpec("data", 0, 4, (1, 3)),)


def example(device: str = "cpu") -> dict[str, Any]:
    return {
        "model": OrderedDict(
            weight=nn.Parameter(torch.arange(6.0, device=device).view(2, 3)),
            channels_last=torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
            strided=torch.arange(12.0, device=device).view(3, 4)[:, 1],
            empty=torch.zeros(0, 3, device=device),
            scalar=torch.tensor(2, device=device),
            shard=LogicalShard.wrap(torch.ones(2, 3, dtype=torch.bfloat16, device=device), SPECS),
        ),
        "optimizer_0": {"betas": (0.9, torch.ones(1, device=device)), "lr": 0.1, "names": ["a", None]},
    }


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [tensor for value in state for tensor in tensors_of(value)] if isinstance(state, list | tuple) else []


def check_copy(state: dict[str, Any], copy: dict[str, Any]) -> None:
    for tensor, copied in zip(tensors_of(state), tensors_of(copy), strict=True):
        assert type(copied) is (LogicalShard if isinstance(tensor, LogicalShard) else Tensor)
        assert copied.device.type == "cpu"
        assert not copied.requires_grad
        assert (copied.dtype, copied.shape, copied.size()) == (tensor.dtype, tensor.shape, tensor.size())
        assert copied.numel() == 0 or copied.data_ptr() != tensor.data_ptr()
        assert torch.equal(copied.as_subclass(Tensor), tensor.detach().as_subclass(Tensor).cpu())
    assert copy["optimizer_0"]["lr"] == 0.1
    assert copy["optimizer_0"]["names"] == ["a", None]
    assert copy["optimizer_0"]["betas"][0] == 0.9


def test_copies_are_equal_and_apart() -> None:
    state = example()
    copy = HostCopy().take(state)
    check_copy(state, copy)
    before = [tensor.clone() for tensor in tensors_of(copy)]
    with torch.no_grad():
        for tensor in tensors_of(state):
            tensor.as_subclass(Tensor).zero_()
    state["optimizer_0"]["names"].append("later")
    state["model"]["new"] = 1
    for tensor, copied in zip(before, tensors_of(copy), strict=True):
        assert torch.equal(tensor.as_subclass(Tensor), copied.as_subclass(Tensor))
    assert copy["optimizer_0"]["names"] == ["a", None]
    assert "new" not in copy["model"]


def test_shards_describe_the_same_part() -> None:
    shard = example()["model"]["shard"]
    copied = HostCopy().take({"shard": shard})["shard"]
    assert copied.size() == torch.Size([4, 3])
    assert copied.specs == SPECS
    assert copied.__create_chunk_list__() == shard.__create_chunk_list__()


def test_memory_is_used_again_where_it_fits() -> None:
    host = HostCopy()
    first = {key: value.data_ptr() for key, value in host.take(example())["model"].items()}
    state = example()
    state["model"]["scalar"] = torch.tensor(2.0)
    state["model"]["strided"] = torch.zeros(4)
    state["model"]["added"] = torch.ones(2)
    del state["model"]["channels_last"]
    copy = host.take(state)
    for key in ("weight", "shard"):
        assert copy["model"][key].data_ptr() == first[key]
    check_copy(state, copy)
    assert len(host._buffers) == len(tensors_of(state)), "buffers that are not used are not kept"


def test_is_what_the_store_writes(tmp_path: Path) -> None:
    state = example()
    del state["model"]["shard"]  # one rank does not hold all of it
    store.write(tmp_path / "a.ckpt", HostCopy().take(state), {}, step=1, group=None)
    target = HostCopy().take(state)
    for tensor in tensors_of(target):
        tensor.zero_()
    store.open(tmp_path / "a.ckpt", None).read(target)
    check_copy(state, target)


@pytest.mark.gpu
def test_copies_from_a_gpu_are_pinned() -> None:
    host, state = HostCopy(), example("cuda")
    copy = host.take(state)
    check_copy(state, copy)
    assert all(tensor.is_pinned() for tensor in tensors_of(copy) if tensor.numel())
    addresses = [tensor.data_ptr() for tensor in tensors_of(copy)]
    with torch.no_grad():
        state["model"]["weight"].add_(1)
    check_copy(state, host.take(state))
    assert [tensor.data_ptr() for tensor in tensors_of(host.take(state))] == addresses
