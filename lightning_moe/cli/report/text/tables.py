"""The report of a language model as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_moe.cli.report.tables import print_run, styled_ratio, styled_table
from lightning_moe.cli.report.text.summary import TextSummary
from lightning_moe.data.text import printable

_EXPLANATION = (
    "The compressors saw nothing but this text. The model was trained on other documents of the same corpus, and its "
    "own size is not counted."
)


def print_text_summary(summary: TextSummary, console: Console) -> None:
    """Print bits per byte beside those of compressors, a sample, the expert load and the facts of the run."""
    console.print(_comparison_table(summary))
    console.print(_EXPLANATION, highlight=False)
    console.print()
    console.print("Sample: the beginning of the held-out text, and how the model goes on", style="bold")
    sample = Text.assemble((printable(summary.sample_prompt), "dim"), printable(summary.sample))
    console.print(Padding(sample, (0, 0, 1, 2)))
    seen = summary.tokens_seen
    print_run(summary, console, loss=f"{summary.test_loss:.4f} nats per token", **_tokens(seen))


def _comparison_table(summary: TextSummary) -> Table:
    table = styled_table(f"Held-out text, {summary.held_out_bytes:,} bytes (lower is better)")
    table.add_column("compressor")
    table.add_column("bits per byte", justify="right")
    table.add_column("this model against it", justify="right")
    table.add_row("[bold]this model[/]", f"[bold]{summary.bits_per_byte:.3f}[/]", "")
    compressors = {
        "gzip": summary.gzip_bits_per_byte,
        "bz2": summary.bz2_bits_per_byte,
        "xz": summary.xz_bits_per_byte,
    }
    for name, bits in compressors.items():
        table.add_row(name, f"{bits:.3f}", styled_ratio(summary.bits_per_byte / bits))
    return table


def _tokens(seen: int | None) -> dict[str, str]:
    return {} if seen is None else {"tokens": f"{seen:,} in training"}
