"""Settings of the GPT-MoE language model (torch-free), and those of published models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from lightning_moe.config.gpt_rules import GPT_RULES, head_size_of, num_kv_heads_of
from lightning_moe.config.moe import MoEConfig
from lightning_moe.config.ranges import Rule, validate
from lightning_moe.config.rope import RopeScaling

ActivationCheckpointing = Literal["none", "selective", "full"]
"""What is computed again in the backward pass instead of being kept: nothing, all but the experts, or whole blocks."""


@dataclass(frozen=True, kw_only=True)
class GPTMoEConfig:
    """Sizes and blocks of a decoder-only language model with mixture-of-experts layers.

    A block is a superset of those of Mixtral (arXiv:2401.04088), Qwen3-MoE (arXiv:2505.09388), OLMoE (arXiv:2409.02060)
    and DeepSeek's MoE models (arXiv:2401.06066, arXiv:2412.19437, without their latent attention). The presets
    (:meth:`mixtral_8x7b`, ...) have the shapes and the routing of the published models; their load-balancing losses are
    :class:`MoEConfig`'s defaults.

    Raises:
        ConfigError: A field has the wrong type, or the fields contradict each other (see ``GPT_RULES``).
    """

    rules: ClassVar[tuple[Rule, ...]] = GPT_RULES

    vocab_size: int = 257
    """Number of different tokens."""
    hidden_size: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Number of blocks."""
    num_heads: int = 4
    """Number of query heads in each block."""
    num_kv_heads: int | None = None
    """Number of key-value heads in each block; null takes as many as there are query heads."""
    head_size: int | None = None
    """Width of one attention head; null takes an equal share of the hidden size."""
    ffn_hidden_size: int = 256
    """Inner width of the feed-forward layers without experts."""
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    """Mixture-of-Experts layer of each block; null makes every block dense."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the blocks, from 0, that have a dense feed-forward layer instead of experts."""
    max_sequence_length: int = 512
    """Largest number of tokens that the model is trained or used with."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of the rotary position encoding."""
    rope_scaling: RopeScaling | None = None
    """How rotary wavelengths are stretched beyond the length they were trained with; null leaves them."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Normalisation of queries and keys: none, of each head, or of all heads together."""
    norm_eps: float = 1e-6
    """Added to the mean square in every normalisation."""
    tie_embeddings: bool = False
    """Whether the output projection is the transposed embedding."""
    sliding_window: int | None = None
    """Number of tokens, itself included, that a token attends to; null admits all before it."""
    init_std: float = 0.02
    """Standard deviation of the initial weights outside of the experts."""

    def __post_init__(self) -> None:
        validate(self, "config", self.rules)

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return num_kv_heads_of(self)

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return head_size_of(self)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks that have experts."""
        if self.moe is None:
            return ()
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)

    @classmethod
    def tiny(cls) -> Self:
        """A byte-level model of some hundred thousand parameters, for a first try on a CPU."""
        return cls()

    @classmethod
    def mixtral_8x7b(cls) -> Self:
        """Mixtral-8x7B-v0.1: 46.7 B parameters, 12.9 B of them active."""
        return cls(
            vocab_size=32000,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            ffn_hidden_size=14336,
            moe=MoEConfig(num_experts=8, top_k=2, expert_hidden_size=14336),
            max_sequence_length=32768,
            rope_theta=1e6,
            norm_eps=1e-5,
        )

    @classmethod
    def mixtral_8x22b(cls) -> Self:
        """Mixtral-8x22B-v0.1: 140.6 B parameters, 39.2 B of them active."""
        return cls(
            vocab_size=32000,
            hidden_size=6144,
            num_layers=56,
            num_heads=48,
            num_kv_heads=8,
            ffn_hidden_size=16384,
            moe=MoEConfig(num_experts=8, top_k=2, expert_hidden_size=16384),
            max_sequence_length=65536,
            rope_theta=1e6,
            norm_eps=1e-5,
        )

    @classmethod
    def qwen3_30b_a3b(cls) -> Self:
        """Qwen3-30B-A3B: 30.5 B parameters, 3.4 B of them active."""
        return cls(
            vocab_size=151936,
            hidden_size=2048,
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_size=128,
            ffn_hidden_size=6144,
            moe=MoEConfig(num_experts=128, top_k=8, expert_hidden_size=768),
            max_sequence_length=40960,
            rope_theta=1e6,
            qk_norm="head",
        )

    @classmethod
    def qwen3_235b_a22b(cls) -> Self:
        """Qwen3-235B-A22B: 235.1 B parameters, 22.2 B of them active."""
        return cls(
            vocab_size=151936,
            hidden_size=4096,
            num_layers=94,
            num_heads=64,
            num_kv_heads=4,
            head_size=128,
            ffn_hidden_size=12288,
            moe=MoEConfig(num_experts=128, top_k=8, expert_hidden_size=1536),
            max_sequence_length=40960,
            rope_theta=1e6,
            qk_norm="head",
        )

    @classmethod
    def olmoe_1b_7b(cls) -> Self:
        """OLMoE-1B-7B-0924: 6.9 B parameters, 1.3 B of them active."""
        return cls(
            vocab_size=50304,
            hidden_size=2048,
            num_layers=16,
            num_heads=16,
            ffn_hidden_size=1024,
            moe=MoEConfig(num_experts=64, top_k=8, expert_hidden_size=1024, renormalize=False),
            max_sequence_length=4096,
            qk_norm="projection",
            norm_eps=1e-5,
        )

    @classmethod
    def deepseek_moe_16b(cls) -> Self:
        """DeepSeekMoE-16B: 16.4 B parameters, 2.8 B of them active; the first block is dense."""
        return cls(
            vocab_size=102400,
            hidden_size=2048,
            num_layers=28,
            num_heads=16,
            ffn_hidden_size=10944,
            moe=MoEConfig(
                num_experts=64,
                top_k=6,
                expert_hidden_size=1408,
                renormalize=False,
                shared_expert_hidden_size=2816,
            ),
            dense_layers=(0,),
            max_sequence_length=4096,
        )
