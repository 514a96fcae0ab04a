"""Text: documents, vocabularies, packed sequences, and the data module that hands these to a Trainer."""

from lightning_moe.data.text.bpe import BPETokenizer
from lightning_moe.data.text.compression import compression_bits_per_byte
from lightning_moe.data.text.module import TextDataModule
from lightning_moe.data.text.packing import TextBatch
from lightning_moe.data.text.tokenizer import ByteTokenizer, Tokenizer, printable

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "TextBatch",
    "TextDataModule",
    "Tokenizer",
    "compression_bits_per_byte",
    "printable",
]
