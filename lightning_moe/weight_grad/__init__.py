"""Matrix multiplications that own a weight: their weight gradients can be accumulated in float32, or deferred."""

from lightning_moe.weight_grad.gathered import GatheredInputGrad, GatheredOutputGrad
from lightning_moe.weight_grad.grouped import GroupedMatmulGrad, can_group, grouped_linear, grouped_product
from lightning_moe.weight_grad.grouped_segments import SegmentedMatmulGrad, bounds_of
from lightning_moe.weight_grad.linear import MatmulGrad, compute_dtype, linear, matmul_grad
from lightning_moe.weight_grad.queue import WeightGradOwner, WeightGradQueue, WeightGradStatistics
from lightning_moe.weight_grad.sink import WeightGrad, WeightGradSink, attach_sink, deliver, detach_sink, sink_of

__all__ = [
    "GatheredInputGrad",
    "GatheredOutputGrad",
    "GroupedMatmulGrad",
    "MatmulGrad",
    "SegmentedMatmulGrad",
    "WeightGrad",
    "WeightGradOwner",
    "WeightGradQueue",
    "WeightGradSink",
    "WeightGradStatistics",
    "attach_sink",
    "bounds_of",
    "can_group",
    "compute_dtype",
    "deliver",
    "detach_sink",
    "grouped_linear",
    "grouped_product",
    "linear",
    "matmul_grad",
    "sink_of",
]
