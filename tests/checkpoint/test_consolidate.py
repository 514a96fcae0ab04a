"""One safetensors file from checkpoints of every kind, read back with safetensors itself."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_moe import ConfigError, __version__
from lightning_moe.checkpoint import store
from lightning_moe.checkpoint.consolidate import consolidate
from lightning_moe.checkpoint.shards import LogicalShard
from lightning_moe.errors import CheckpointError
from lightning_moe.parallel.layout import Axis
from lightning_moe.parallel.sharding import ShardSpec
from tests.distributed import RankPool
from tests.strategy.tiny import TinyMoE, loader, trainer, wholes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


def weights() -> dict[str, Tensor]:
    """Tensors of many dtypes and shapes."""
    generator = torch.Generator().manual_seed(0)
    values = {f"of.{dtype}": torch.randn(3, 5, generator=generator).to(dtype) for dtype in DTYPES}
    return {**values, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd.size": torch.ones(3).bool()}


def save(path: Path, values: dict[str, Tensor], step: int = 7, **more: Any) -> Path:
    meta = more.pop("meta", {"global_step": step})
    store.write(path, {"model": dict(values), **more}, meta, step=step, group=None)
    return path


def check_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype, name
        assert loaded[name].shape == value.shape, name
        assert torch.equal(as_bytes(loaded[name]), as_bytes(value)), name


def as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_every_tensor_bit_for_bit(tmp_path: Path) -> None:
    source = save(tmp_path / "step=7.ckpt", weights(), optimizer_0={"state": {"w": {"step": torch.tensor(1.0)}}})
    done = consolidate(source, tmp_path / "new" / "all.safetensors")
    assert done.path == tmp_path / "new" / "all.safetensors"
    check_same(load_file(done.path), weights())
    assert (done.step, done.averaged, done.checkpoint, done.left_out) == (7, False, source, ())
    assert done.tensors == len(weights())
    assert done.parameters == sum(value.numel() for value in weights().values())
    assert done.bytes == done.path.stat().st_size
    with safe_open(done.path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "step": "7",
            "checkpoint": "step=7.ckpt",
            "weights": "trained",
            "lightning_moe": __version__,
        }
    assert listing(done.path.parent) == ["all.safetensors"]
    expected = 0o666 & ~current_umask()
    assert stat.S_IMODE(done.path.stat().st_mode) == expected, "as readable as other files of the user"


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_touches_floating_point_only(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save(tmp_path / "a.ckpt", weights())
    loaded = load_file(consolidate(source, tmp_path / "a.safetensors", dtype=dtype).path)
    expected = {n: value.to(dtype) if value.is_floating_point() else value for n, value in weights().items()}
    check_same(loaded, expected)


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    values = {"infinite.before": torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0])}
    source = save(tmp_path / "a.ckpt", values)
    loaded = load_file(consolidate(source, tmp_path / "a.safetensors", dtype=torch.float16).path)
    assert torch.equal(loaded["infinite.before"][:2], torch.tensor([torch.inf, -torch.inf]).half())
    source = save(tmp_path / "b.ckpt", {"head": torch.tensor([1.0, torch.inf, torch.nan, -7e4])})
    with pytest.raises(ConfigError, match=r"dtype: 'float16' is not allowed.*head has a value of 7e\+04"):
        consolidate(source, tmp_path / "b.safetensors", dtype=torch.float16)
    assert "b.safetensors" not in listing(tmp_path)
    assert len(listing(tmp_path)) == 3, "nothing is left behind"


def write_experts(folder: str) -> None:
    """Four experts in a scrambled order on two ranks."""
    rank = dist.get_rank()
    index = ((2, 0), (1, 3))[rank]
    spec = ShardSpec(dim=0, axis=Axis.EXPERT, index=index, size=4)
    local = torch.stack([torch.full((2, 3), float(expert)) for expert in index])
    state = {"model": {"experts": LogicalShard.wrap(local, (spec,)), "norm": torch.arange(3.0)}}
    store.write(Path(folder), state, {}, step=3, group=dist.group.WORLD)


def test_tensors_of_several_ranks_are_whole(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, write_experts, str(tmp_path / "a.ckpt"))
    done = consolidate(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    experts = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 3).contiguous()
    check_same(load_file(done.path), {"experts": experts, "norm": torch.arange(3.0)})


def test_a_folder_stands_for_its_newest_valid_checkpoint(tmp_path: Path) -> None:
    for step in (10, 9, 11):
        save(tmp_path / f"step={step}.ckpt", {"w": torch.full((2,), float(step))}, step)
    assert consolidate(tmp_path, tmp_path / "a.safetensors").checkpoint == tmp_path / "step=11.ckpt"
    (shard,) = (tmp_path / "step=11.ckpt").glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match="step=11"):
        done = consolidate(tmp_path, tmp_path / "b.safetensors")
    assert done.step == 10
    assert load_file(done.path)["w"].tolist() == [10.0, 10.0]
    with pytest.raises(CheckpointError, match=r"step=11\.ckpt.*__0_0\.distcp"):
        consolidate(tmp_path / "step=11.ckpt", tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_an_average_is_written_in_place_of_the_weights(tmp_path: Path) -> None:
    average, current = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    source = save(tmp_path / "a.ckpt", average, current_model_state=current)
    done = consolidate(source, tmp_path / "a.safetensors")
    assert done.averaged
    check_same(load_file(done.path), average)
    with safe_open(done.path, "pt") as file:
        assert file.metadata()["weights"] == "averaged"


def test_entries_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    source = save(tmp_path / "a.ckpt", {"w": torch.ones(2)}, meta={"objects_of_state_dict": {"layer._extra_state": 5}})
    done = consolidate(source, tmp_path / "a.safetensors")
    assert done.left_out == ("layer._extra_state",)
    assert load_file(done.path).keys() == {"w"}


class Tied(nn.Module):
    """One weight under two names, and a view into a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("column", torch.arange(12.0).reshape(3, 4)[:, 1])


def test_a_file_of_lightning_with_tied_weights(tmp_path: Path) -> None:
    module = Tied()
    torch.save({"state_dict": module.state_dict(), "global_step": 12, "epoch": 1}, tmp_path / "whole.ckpt")
    done = consolidate(tmp_path / "whole.ckpt", tmp_path / "a.safetensors")
    assert (done.step, done.averaged, done.tensors) == (12, False, 3)
    loaded = load_file(done.path)
    other = Tied()
    other.load_state_dict(loaded)
    check_same(dict(other.state_dict()), dict(module.state_dict()))
    assert other.head.weight is other.embed.weight


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/should-never-exist",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such checkpoint"),
        (b"hello, this is no checkpoint", "it is no checkpoint"),
        (b"", "it is no checkpoint"),
        ({"weights": {}}, "it has no 'state_dict'"),
        ([1, 2], "it has no 'state_dict'"),
        ({"state_dict": {"w": torch.ones(1)}, "x": Evil()}, "it holds more than plain values and tensors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    source = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(CheckpointError, match=message) as refusal:
        consolidate(source, tmp_path / "a.safetensors")
    assert str(source) in str(refusal.value)
    assert not Path("/tmp/should-never-exist").exists()
    assert "a.safetensors" not in listing(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1000)}}, tmp_path / "x.ckpt")
    data = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="it is no checkpoint"):
        consolidate(tmp_path / "x.ckpt", tmp_path / "a.safetensors")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        consolidate(tmp_path, tmp_path / "a.safetensors")


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "a.ckpt", {"w": torch.ones(2)})
    output = tmp_path / "a.safetensors"
    output.write_text("precious")
    with pytest.raises(ConfigError, match="--force"):
        consolidate(source, output)
    assert output.read_text() == "precious"
    consolidate(source, output, overwrite=True)
    check_same(load_file(output), {"w": torch.ones(2)})


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_place_for_a_file(tmp_path: Path, overwrite: bool) -> None:
    source = save(tmp_path / "a.ckpt", {"w": torch.ones(2)})
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ConfigError, match="it is a directory"):
        consolidate(source, tmp_path / "b.safetensors", overwrite=overwrite)
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        consolidate(tmp_path / "weights.safetensors", source, overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/a\.safetensors: it could not be written"):
        consolidate(source, tmp_path / "file" / "a.safetensors", overwrite=overwrite)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make the system refuse to write more, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 4096, 2_000_000])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, size: int) -> None:
    source = save(tmp_path / "a.ckpt", {"v": torch.ones(100), "w": torch.ones(1_000_000)})
    output = tmp_path / "a.safetensors"
    consolidate(save(tmp_path / "older.ckpt", {"w": torch.zeros(3)}, 1), output)
    before = listing(tmp_path)
    with (
        files_of_at_most(size),
        pytest.raises(CheckpointError, match="it could not be written: File too large") as failure,
    ):
        consolidate(source, output, overwrite=True)
    assert failure.value.path == str(output)
    assert listing(tmp_path) == before
    check_same(load_file(output), {"w": torch.zeros(3)})


def train_and_save(folder: str, ema: bool) -> dict[str, Any]:
    """Two steps with experts on two ranks; the whole weights that evaluation would use."""
    module = TinyMoE()
    callbacks = [EMAWeightAveraging(decay=0.5)] if ema else []
    run = trainer(2, 2, max_steps=2, callbacks=callbacks)
    run.fit(module, loader(16, 8, 2, run.global_rank))
    run.save_checkpoint(f"{folder}/after.ckpt")
    return wholes(module, module.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
def test_a_trained_module_loads_strictly(ranks: RankPool, tmp_path: Path, ema: bool) -> None:
    expected = ranks.run(2, train_and_save, str(tmp_path), ema, init_process_group=False)[0]
    done = consolidate(tmp_path, tmp_path / "a.safetensors")
    assert done.step == 2
    module = TinyMoE()
    module.configure_model()
    module.load_state_dict(load_file(done.path))
    check_same(dict(module.state_dict()), expected)
