"""``lightning-moe convert CHECKPOINT OUTPUT.safetensors``: a checkpoint's whole weights as one file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from lightning_moe.errors import CheckpointError, ConfigError

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` is what follows ``convert``.

    Returns:
        The exit code: 0, 2 when an argument was refused, 1 when the checkpoint cannot be read or the file not written.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    started = time.perf_counter()
    import torch  # --help need not wait for it

    from lightning_moe.checkpoint.consolidate import consolidate

    dtype = getattr(torch, options.dtype) if options.dtype else None
    try:
        done = consolidate(options.checkpoint, options.output, dtype=dtype, overwrite=options.force)
    except (ConfigError, CheckpointError) as problem:
        print(problem, file=sys.stderr)
        return 2 if isinstance(problem, ConfigError) else 1
    if done.left_out:
        print(f"left out, as they are no tensors: {', '.join(done.left_out)}", file=sys.stderr)
    kind = "averaged" if done.averaged else "trained"
    print(
        f"{done.path}: {kind} weights of step {done.step} from {done.checkpoint}, "
        f"{done.tensors} tensors, {done.parameters:,} values, {done.bytes / 1e6:,.1f} MB"
    )
    if options.json:
        result = {
            "path": str(done.path),
            "checkpoint": str(done.checkpoint),
            "step": done.step,
            "weights": kind,
            "tensors": done.tensors,
            "parameters": done.parameters,
            "bytes": done.bytes,
            "left_out": list(done.left_out),
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-moe convert",
        description="Writes the whole weights of a checkpoint as one safetensors file, in one process. Names are those "
        "of the LightningModule's state_dict. Where weight averaging keeps an average, the average is written.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint directory, a folder of them (the newest valid one is taken), or a file of Lightning",
    )
    parser.add_argument("output", metavar="OUTPUT.safetensors", help="the file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="cast floating-point weights; by default each stays as saved")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser
