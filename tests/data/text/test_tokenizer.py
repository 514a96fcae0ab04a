"""Vocabularies give back every text, and know the bytes of every token."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Model

from lightning_moe.data.text import BPETokenizer, ByteTokenizer, Tokenizer, printable
from lightning_moe.data.text.bpe import END_TOKEN, cached_path, read_description, train_bpe, write_atomically
from lightning_moe.errors import ConfigError

TEXTS = [
    b"def f(x):\n    return x + 1\n" * 20,
    "Übergrößenträger; 世界, 世界 🙂\n".encode() * 20,
    b"the router sends the token to the expert\n" * 20,
]

BYTES = ByteTokenizer()
BPE = BPETokenizer(train_bpe(TEXTS, 320))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(text=st.text())
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.end not in tokens


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_the_name_of_the_end_is_an_ordinary_text(tokenizer: Tokenizer) -> None:
    text = f"before {END_TOKEN} after"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.end]) == ""


def test_bytes() -> None:
    assert BYTES.vocab_size == 257
    assert BYTES.encode("aß") == [97, 0xC3, 0x9F]
    assert BYTES.decode([0xC3]) == "\ufffd", "half a character"
    tokens = BYTES.encode_documents([b"ab", b"", b"c"])
    assert tokens.tolist() == [97, 98, 256, 256, 99, 256]
    assert tokens.dtype == np.uint16


def test_trained_vocabulary_has_the_size_asked_for_and_compresses() -> None:
    assert BPE.vocab_size == 320 == len(BPE.token_bytes)
    assert sorted(token for token in BPE.token_bytes if len(token) == 1) == [bytes([value]) for value in range(256)]
    assert len(BPE.encode(TEXTS[2].decode())) < len(TEXTS[2]) / 2


def test_bytes_of_tokens_are_those_of_the_library() -> None:
    """The decoder of ``tokenizers`` against our table."""
    model = Model.from_str(train_bpe(TEXTS, 320))
    for text in TEXTS:
        tokens = BPE.encode(text.decode())
        assert b"".join(BPE.token_bytes[token] for token in tokens) == text
        assert model.decode(tokens) == text.decode()
        assert model.encode(text.decode()).ids == tokens


def test_training_is_a_function_of_the_texts() -> None:
    assert train_bpe(TEXTS, 300) == train_bpe(TEXTS, 300)
    paths = {cached_path(Path("cache"), *arguments) for arguments in [(TEXTS, 300), (TEXTS, 320), (TEXTS[:2], 300)]}
    assert len(paths) == 3
    assert cached_path(Path("cache"), [b"ab", b"c"], 300) != cached_path(Path("cache"), [b"a", b"bc"], 300)


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size: 400 .* at most 2\d\d"):
        train_bpe([b"abab"], 400)


def test_training_cuts_endless_words_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    description = train_bpe(TEXTS, 320)
    monkeypatch.setattr("lightning_moe.data.text.bpe._LONGEST_WORD", 60)
    assert train_bpe(TEXTS, 320) == description, "texts, but no words, are longer"
    endless = ("世x" * 45).encode()
    pieces = [("世x" * 30).encode(), ("世x" * 15).encode()]
    assert train_bpe([endless, *TEXTS], 320) == train_bpe([*pieces, *TEXTS], 320) != train_bpe(TEXTS, 320)


def test_tokens_beyond_two_bytes() -> None:
    class Large(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.token_bytes = (*self.token_bytes, *(b"x" for _ in range(1 << 16)))

    assert Large().dtype == np.uint32


def test_a_copy_in_another_process_encodes_alike() -> None:
    text = f"def {END_TOKEN}"
    assert pickle.loads(pickle.dumps(BPE)).encode(text) == BPE.encode(text)


def test_writing_leaves_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokenizer.json"
    write_atomically(path, "first")
    write_atomically(path, "second")
    assert [one.name for one in path.parent.iterdir()] == ["tokenizer.json"]
    assert read_description(path) == "second"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "a cache may be shared"


def test_printable_text_keeps_its_lines() -> None:
    assert printable("a\tb\n\x1b[31m\r\x9bß🙂") == "a\tb\n\ufffd[31m\ufffd\ufffdß🙂"


# --- files of others


def published(**changes: Any) -> str:
    """A vocabulary with everything that published ones come with."""
    model = Model.from_str(train_bpe(TEXTS, 320))
    model.normalizer = normalizers.NFC()
    model.add_special_tokens([AddedToken("<|begin|>", special=True)])
    model.add_tokens([AddedToken("<think>", normalized=False)])
    model.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", model.token_to_id("<|begin|>"))]
    )
    model.enable_truncation(3)
    model.enable_padding(length=9)
    return json.dumps(json.loads(model.to_str()) | changes)


def test_settings_that_lose_text_are_left_aside() -> None:
    tokenizer = BPETokenizer(published())
    text = "re\u0301sume\u0301 <think> <|begin|> " + "long " * 10
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens[0]] == b"re"[: len(tokenizer.token_bytes[tokens[0]])], "nothing in front"
    assert tokenizer.vocab_size == 322


def test_end_token_by_name() -> None:
    tokenizer = BPETokenizer(published(), "<|begin|>")
    assert tokenizer.end == 320
    with pytest.raises(ConfigError, match=r"data\.end_token: '</s>'"):
        BPETokenizer(published(), "</s>")


def test_other_vocabularies_are_refused() -> None:
    words = Model(models.WordLevel({END_TOKEN: 0, "a": 1, "世": 2}, unk_token=END_TOKEN))
    with pytest.raises(ConfigError, match="byte-level"):
        BPETokenizer(words.to_str())
    with pytest.raises(ConfigError, match="byte-level"):
        BPETokenizer("{}")
    spaced = Model.from_str(train_bpe(TEXTS, 300))
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced.decoder = decoders.ByteLevel()
    with pytest.raises(ConfigError, match="adds or strips spaces"):
        BPETokenizer(spaced.to_str())


def test_an_added_token_that_strips_spaces_is_found_out() -> None:
    model = Model.from_str(train_bpe(TEXTS, 320))
    model.add_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer = BPETokenizer(model.to_str())
    with pytest.raises(ConfigError, match="adds or strips spaces"):
        tokenizer.encode("a   <mask>")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*none\.json"):
        read_description(tmp_path / "none.json")
