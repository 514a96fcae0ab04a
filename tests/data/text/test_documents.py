"""Which documents there are, and which are held out."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from lightning_moe.data.text.compression import compression_bits_per_byte
from lightning_moe.data.text.documents import Document, read_folder, read_standard_library, split_documents
from lightning_moe.errors import ConfigError
from tests.data.text.folder import write_texts


def test_standard_library_and_what_compressors_make_of_its_held_out_part() -> None:
    documents = read_standard_library()
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages", "idlelib"))
    assert 10e6 < sum(len(document.text) for document in documents) < 14e6
    parts = split_documents(documents, 20)
    assert sorted([*parts.training, *parts.validation, *parts.test]) == sorted(documents)
    bits = compression_bits_per_byte(b"".join(document.text for document in parts.test))
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the figures are those of the sources of Python 3.11")
    assert len(parts.test) == 30
    assert bits == pytest.approx({"gzip": 1.923, "bz2": 1.671, "xz": 1.662}, abs=0.005)


def test_texts_are_the_files_byte_by_byte() -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    for document in read_standard_library()[::20]:
        assert document.text == (folder / document.name).read_bytes()


def test_hold_out_goes_by_the_name() -> None:
    documents = [Document(f"{number}.txt", b"text") for number in range(200)]
    parts = split_documents(documents, 5)
    for remainder, part in ((0, parts.test), (1, parts.validation)):
        assert part == [
            one for one in documents if int.from_bytes(hashlib.md5(one.name.encode()).digest()) % 5 == remainder
        ]
    fewer = split_documents(documents[::2], 5)
    assert set(fewer.test) == set(parts.test) & set(documents[::2])


def test_folder_in_the_order_of_names(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    (tmp_path / "other.md").write_text("not a text")
    documents = read_folder(tmp_path, "*.txt")
    assert [document.name for document in documents] == sorted(texts)
    assert {document.name: document.text for document in documents} == texts
    assert [document.name for document in read_folder(tmp_path, "*.md")] == ["other.md"]


def test_what_is_no_utf8_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("süß".encode("latin-1"))
    (document,) = read_folder(tmp_path, "*.txt")
    assert document.text.decode() == "s\ufffd\ufffd"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file systems refuse such names")
def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    name = b"s\xfc\xdf.txt"
    (tmp_path / os.fsdecode(name)).write_text("latin")
    parts = split_documents(read_folder(tmp_path, "*.txt"), 5)
    remainder = int.from_bytes(hashlib.md5(name).digest()) % 5
    part = {0: parts.test, 1: parts.validation}.get(remainder, parts.training)
    assert b"latin" in [document.text for document in part]
    assert sum(map(len, parts)) == len(texts) + 1


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.pattern: '\*\.rst'"):
        read_folder(tmp_path, "*.rst")


def test_every_part_has_text() -> None:
    documents = [Document(f"{number}.txt", b"text") for number in range(200)]
    parts = split_documents(documents, 5)
    emptied = [Document(one.name, b"") if one in parts.validation else one for one in documents]
    for given, part in ((parts.training + parts.validation, "test"), (emptied, "validation")):
        with pytest.raises(ConfigError, match=rf"data\.holdout_modulus: 5 .* falls to {part}"):
            split_documents(given, 5)
