"""What the cost model, fed with the rates of this run, says of the contestants that it knows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from lightning_moe.bench.moe_rounds import Series
from lightning_moe.moe.overlap.cost import LayerShape, Rates, Save, hideable, predict
from lightning_moe.moe.overlap.plan import Chunking

PASSES = {"forward": False, "backward": True}
"""The parts of a step that are predicted, and whether each is a backward pass."""


def predicted_milliseconds(
    shape: LayerShape, rates: Rates, chunking: Chunking | None, save: Save, *, wait_at_once: bool = False
) -> dict[str, float]:
    """Of forward, backward and both; exchange and experts alone, without the router.

    Args:
        shape: Sizes of the layer.
        rates: Those that were measured.
        chunking: How rows are cut; None for all-to-alls.
        save: What backward finds kept.
        wait_at_once: Whether messages are waited for where they are sent.
    """
    found = {
        name: 1e3 * predict(shape, rates, chunking, backward=backward, save=save, wait_at_once=wait_at_once).seconds
        for name, backward in PASSES.items()
    }
    return found | {"step": sum(found.values())}


def limit_milliseconds(shape: LayerShape, rates: Rates, chunking: Chunking, save: Save) -> dict[str, float]:
    """The longer of computation and communication, each without pause: what no order of a chunking's parts can beat.

    Arguments as for :func:`predicted_milliseconds`.
    """
    found = {}
    for name, backward in PASSES.items():
        all_exposed = predict(shape, rates, chunking, backward=backward, save=save, wait_at_once=True)
        communication = all_exposed.communication
        found[name] = 1e3 * max(all_exposed.seconds - communication, communication)
    return found | {"step": sum(found.values())}


def hidden_fractions(
    found: Mapping[str, Series], shape: LayerShape, rates: Rates, chunking: Chunking, save: Save
) -> dict[str, dict[str, float | None]]:
    """How much of the communication that the model says can be hidden is hidden, forward and backward.

    What is hidden is the time that waiting at once takes longer, the median over the rounds. On a machine with other
    work the fastest rounds of both tell more. It may exceed what can be hidden: that is the model's figure.

    Args:
        found: Measured series; ``p2p`` and ``waiting`` are among them.
        shape: Sizes of the layer.
        rates: Those that were measured.
        chunking: How both cut their rows.
        save: What backward finds kept.

    Returns:
        By pass ``hideable_milliseconds``, ``hidden_milliseconds``, ``hidden_fraction`` and, of the fastest rounds,
        ``fastest_hidden_fraction``; fractions are None where there is nothing to hide.
    """
    result: dict[str, dict[str, float | None]] = {}
    for name, backward in PASSES.items():
        waiting, overlapped = found["waiting"].seconds[name], found["p2p"].seconds[name]
        hidden = statistics.median(a - b for a, b in zip(waiting, overlapped, strict=True))
        fastest = min(waiting) - min(overlapped)
        most = hideable(shape, rates, chunking, backward=backward, save=save)
        result[name] = {
            "hideable_milliseconds": 1e3 * most,
            "hidden_milliseconds": 1e3 * hidden,
            "hidden_fraction": hidden / most if most > 0 else None,
            "fastest_hidden_fraction": fastest / most if most > 0 else None,
        }
    return result
