"""Time of a device, divided among what it did."""

from __future__ import annotations

from lightning_moe.bench.timing import kind_of_kernel, occupancy


def test_occupancy_divides_the_whole_time() -> None:
    """Computing counts first; communication is exposed only where nothing else runs."""
    kernels = [
        (0.0, 4.0, False),
        (3.0, 7.0, True),  # 3 of 4 exposed, but for the kernel below
        (5.0, 6.0, False),
        (9.0, 10.0, True),  # after two of idleness
        (9.5, 11.0, False),
    ]
    assert occupancy(kernels) == {"computing": 6.5, "only_communicating": 2.5, "idle": 2.0}
    assert occupancy(reversed(kernels)) == occupancy(kernels)
    assert occupancy([]) == {"computing": 0.0, "only_communicating": 0.0, "idle": 0.0}


def test_kernels_are_known_by_name() -> None:
    assert kind_of_kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)") == "communication"
    assert kind_of_kernel("nvjet_sm90_tst_256x128") == "gemm"
    assert kind_of_kernel("triton_poi_fused_mul_0") == "elementwise"
