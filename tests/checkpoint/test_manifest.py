from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lightning_moe.checkpoint.files import DamageError, FileRecord
from lightning_moe.checkpoint.manifest import MANIFEST, Manifest, load_manifest, step_in_name, step_of

FILES = {"__0_0.distcp": FileRecord(1234, 0xDEADBEEF), ".metadata": FileRecord(5, 7), "meta.pt": FileRecord(0, 0)}
EXAMPLE = Manifest(step=30, epoch=2, time_ns=1_700_000_000_123_456_789, files=FILES)


def test_reads_what_it_wrote() -> None:
    assert Manifest.loads(EXAMPLE.dumps()) == EXAMPLE
    without_epoch = Manifest(step=0, epoch=None, time_ns=0, files={})
    assert Manifest.loads(without_epoch.dumps()) == without_epoch


def test_is_plain_json() -> None:
    body = json.loads(EXAMPLE.dumps())
    assert (body["format_version"], body["step"], body["epoch"]) == (1, 30, 2)
    assert body["files"]["__0_0.distcp"] == {"size": 1234, "crc32": "deadbeef"}


def test_every_single_bit_flip_is_an_error() -> None:
    data = EXAMPLE.dumps()
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"is damaged|is no list|format version"):
            Manifest.loads(bytes(flipped))


def test_every_truncation_and_any_rubbish_is_an_error() -> None:
    data = EXAMPLE.dumps()
    generator = random.Random(0)
    rubbish = [generator.randbytes(length) for length in range(60)]
    hostile = [b"[" * 100_000, b"9" * 10_000, b"null", b"[]", b"{}", b'"\\ud800"', b"NaN"]
    for contents in [*(data[:length] for length in range(len(data))), *rubbish, *hostile]:
        with pytest.raises(ValueError, match=r"is damaged|is no list|format version"):
            Manifest.loads(contents)


@pytest.mark.parametrize(
    "name", ["../other.ckpt/__0_0.distcp", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", "é", MANIFEST, "a\n"]
)
def test_names_that_could_lead_elsewhere_are_errors(name: str) -> None:
    data = Manifest(1, None, 1, {name: FileRecord(1, 1)}).dumps()
    with pytest.raises(ValueError, match="is no list"):
        Manifest.loads(data)


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None, [1], 10**30])
@pytest.mark.parametrize("field", ["step", "time_ns", "format_version"])
def test_numbers_are_numbers(field: str, value: object) -> None:
    body = json.loads(EXAMPLE.dumps())
    body[field] = value
    with pytest.raises(ValueError, match=r"is no list|is damaged|format version"):
        Manifest.loads(json.dumps(body).encode())


def test_a_newer_format_is_named() -> None:
    body = json.loads(EXAMPLE.dumps())
    body["format_version"] = 2
    with pytest.raises(ValueError, match="is of format version 2, and this release reads 1"):
        Manifest.loads(json.dumps(body).encode())


def test_problems_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="is missing"):
        load_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(EXAMPLE.dumps()[:-2])
    with pytest.raises(DamageError, match="is no list"):
        load_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(EXAMPLE.dumps())
    assert load_manifest(tmp_path) == EXAMPLE


def test_step_in_names() -> None:
    assert step_in_name(Path("/a/step=3/epoch=1-step=20.ckpt")) == 20
    assert step_in_name(Path("step=1-step=2-v1.ckpt")) == 2
    assert step_in_name(Path("/step=3/last.ckpt")) is None
    assert step_of(Path("step=5.ckpt")) == "step 5"
    assert step_of(Path("last.ckpt")) == "unknown step"
