"""The processes of a measurement: started by hand or by torchrun, and their process group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start_ranks(module: str, count: int, arguments: Sequence[str]) -> int | None:
    """Run a measurement on several processes of this machine, and return its exit code.

    Args:
        module: Name of the module that measures.
        count: How many processes.
        arguments: Its command line.

    Returns:
        None in a process that has been started already.
    """
    if "RANK" in os.environ:
        return None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.call([*command, "-m", module, *arguments])


def join_ranks(kind: str) -> torch.device:
    """Join the process group, of NCCL for ``cuda`` and else of gloo; returns this rank's device."""
    torch.set_num_threads(1)
    if kind != "cuda":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device
