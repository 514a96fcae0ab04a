"""Saving and loading: round trips in one process and under expert parallelism, and damaged directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lightning_moe.config import MoEConfig, OptimizerConfig, ParallelConfig
from lightning_moe.errors import ConfigError
from lightning_moe.models.chronos_moe import ChronosMoE
from lightning_moe.models.chronos_moe.model import ChronosMoEModel
from lightning_moe.models.chronos_moe.pretrained import config_from_dict, save_model
from lightning_moe.parallel.mesh import ParallelMesh
from tests.distributed import RankPool
from tests.models.chronos_moe.configs import contexts, small_config


def _module(seed: int = 0, **changes: object) -> ChronosMoE:
    torch.manual_seed(seed)
    module = ChronosMoE(small_config(**changes))
    module.network()
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": None},
        {"quantiles": (0.25, 0.5), "loss": "huber", "use_arcsinh": False},
        {"moe": MoEConfig(num_experts=4, expert_placement=(2, 0, 3, 1), activation="relu", expert_bias=True)},
    ],
    ids=["moe", "dense", "other settings", "placement"],
)
def test_round_trip_is_bitwise(tmp_path: Path, changes: dict[str, object]) -> None:
    module = _module(**changes)
    module.save_pretrained(tmp_path / "model")
    torch.manual_seed(99)
    loaded = ChronosMoE.from_pretrained(tmp_path / "model", optimizer=OptimizerConfig(learning_rate=0.5))
    assert loaded.config == module.config
    assert loaded.optimizer_config.learning_rate == 0.5
    own, other = module.network().state_dict(), loaded.network().state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert torch.equal(loaded.predict(contexts(3)), module.predict(contexts(3)))
    assert all(part.training for part in loaded.modules())  # Lightning does not switch it on before fit


def test_dtype_is_kept(tmp_path: Path) -> None:
    module = _module()
    module.network().bfloat16()
    module.save_pretrained(tmp_path)
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "model.safetensors").values())


def _save_and_load_on_expert_ranks(directory: str, placement: tuple[int, ...] | None) -> tuple[bool, bool, int]:
    mesh = ParallelMesh.build(ParallelConfig(expert=dist.get_world_size()))
    moe = MoEConfig(num_experts=4, expert_hidden_size=16, expert_placement=placement)
    torch.manual_seed(0)
    model = ChronosMoEModel(small_config(moe=moe), mesh)
    save_model(model, directory, mesh)
    loaded = ChronosMoE.from_pretrained(directory, mesh=mesh).network()
    own, other = model.state_dict(), loaded.state_dict()
    same_weights = all(torch.equal(own[name], other[name]) for name in own)
    with torch.no_grad():
        same_forecast = torch.equal(model(contexts(3)).quantiles, loaded(contexts(3)).quantiles)
    return same_weights, same_forecast, own["blocks.0.ffn.experts.down_proj"].shape[0]


@pytest.mark.parametrize("placement", [None, (3, 1, 0, 2)])
def test_expert_ranks_write_whole_experts_in_logical_order(
    tmp_path: Path, ranks: RankPool, placement: tuple[int, ...] | None
) -> None:
    results = ranks.run(2, _save_and_load_on_expert_ranks, str(tmp_path / "parallel"), placement)
    assert results == [(True, True, 2), (True, True, 2)]
    torch.manual_seed(0)
    single = ChronosMoEModel(small_config(moe=MoEConfig(num_experts=4, expert_hidden_size=16)))
    expected, written = single.state_dict(), load_file(tmp_path / "parallel" / "model.safetensors")
    assert expected.keys() == written.keys()
    assert all(torch.equal(expected[name], written[name]) for name in expected)


def test_refuses_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ChronosMoE.from_pretrained(tmp_path)
    _module().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        ChronosMoE.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        ChronosMoE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ChronosMoE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="chronos_moe"):
        ChronosMoE.from_pretrained(tmp_path)


def test_refuses_weights_of_another_configuration(tmp_path: Path) -> None:
    _module().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_layers": 3}))
    with pytest.raises(ConfigError, match="state_dict"):
        ChronosMoE.from_pretrained(tmp_path)


def test_config_from_dict_names_unknown_fields() -> None:
    with pytest.raises(ConfigError, match=r"config\.moe\.num_expert: .*did you mean 'num_experts'"):
        config_from_dict({"moe": {"num_expert": 4}})
    with pytest.raises(ConfigError, match=r"config\.hidden: "):
        config_from_dict({"hidden": 4})
    assert config_from_dict({"moe": None}).moe is None
