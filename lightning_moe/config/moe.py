"""Settings of one Mixture-of-Experts layer (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_moe.config.ranges import Rule, validate
from lightning_moe.config.rules import MOE_RULES


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts, router, load balancing, capacity and placement of a Mixture-of-Experts layer.

    Raises:
        ConfigError: A field has the wrong type, or the fields contradict each other (see ``MOE_RULES``).
    """

    rules: ClassVar[tuple[Rule, ...]] = MOE_RULES

    num_experts: int = 8
    """Number of routed experts in the whole layer, over all ranks."""
    top_k: int = 2
    """Number of experts that each token visits."""
    expert_hidden_size: int = 128
    """Inner width of each routed expert."""
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    """Nonlinearity of the experts; swiglu has a gate projection beside the up projection."""

    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns router logits into scores."""
    router_pre_softmax: bool = True
    """Whether softmax runs over all experts before top-k, instead of over the chosen experts after it."""
    renormalize: bool = True
    """Whether the weights of a token's chosen experts are scaled to sum to one."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the routed experts, after renormalisation."""
    router_dtype: Literal["float32", "float64"] = "float32"
    """Precision of the router's logits and scores, whatever the precision of the model."""
    num_groups: int = 1
    """Number of equal groups that the experts form for group-limited routing; 1 turns it off."""
    top_k_groups: int = 1
    """Number of groups that a token's experts may come from: those with the best sums of two scores."""
    routing_granularity: Literal["token", "series"] = "token"
    """Whether each token is routed by itself or all tokens of a sequence go to the same experts."""

    expert_bias: bool = False
    """Whether a bias, adapted without gradients, steers the choice of experts (auxiliary-loss-free)."""
    expert_bias_update_rate: float = 1e-3
    """Amount by which the expert bias moves at each step."""
    load_balancing: Literal["none", "auxiliary", "sequence", "global"] = "global"
    """Scope of the auxiliary loss: none, this rank's microbatch, each sequence, or the global batch."""
    auxiliary_loss_coefficient: float = 0.01
    """Weight of the auxiliary load-balancing loss."""
    z_loss_coefficient: float = 0.0
    """Weight of the squared log-sum-exp of the router's logits, which keeps them small."""
    force_balance: bool = False
    """Whether tokens are spread evenly regardless of the router's choice, for benchmarks."""

    capacity_factor: float | None = None
    """Largest number of tokens per expert, in multiples of the even share; null never drops a token."""
    drop_policy: Literal["probability", "position"] = "probability"
    """Which tokens a full expert drops: those with the lowest weights, or the last ones."""
    pad_to_capacity: bool = False
    """Whether every expert is padded to its capacity, so that all shapes are static."""

    shared_expert_hidden_size: int = 0
    """Inner width of the expert that every token visits; 0 leaves it out."""
    shared_expert_gate: bool = False
    """Whether a sigmoid gate scales the shared expert's output for each token."""

    grouped_gemm: bool = True
    """Whether local experts run as one grouped matrix multiplication where possible, instead of a loop."""
    expert_placement: tuple[int, ...] | None = None
    """Logical expert of each physical slot, the slots of rank 0 first; null keeps the natural order."""

    def __post_init__(self) -> None:
        validate(self, "moe", self.rules)
