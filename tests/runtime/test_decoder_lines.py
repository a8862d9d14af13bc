"""What decoders write about damaged pictures: left out, and nothing else."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower.data.sources.tfrecord import write_tfrecord
from fastflower.runtime.decoder_lines import pass_on
from tests.conftest import ROOT, example, train_arguments, train_settings, write_dataset
from tests.processes import in_process
from tests.training import tiny_worker

OURS = [
    b"error: /data/val/3.jpg cannot be decoded as a picture\n",
    b"[W1130 17:08:31.123 ProcessGroupNCCL.cpp:1] Warning: a rank is late\n",
    b"[rank1]:[E1130 17:08:31.123 ProcessGroupNCCL.cpp:2] watchdog caught a timeout\n",
    b"[ERROR] of something else\n",
    b"terminate called after throwing an instance of 'c10::Error'\n",
    b"  what():  CUDA error: device-side assert triggered\n",
    b"Invalid device id\n",
    b"\n",
    b"not UTF-8: \xff\xfe\n",
]
DECODERS = [
    b"\x1b[0;31m[ERROR] \x1b[0m[png_parser] Could not retrieve image info from png stream - Unexpected end of stream\n",
    b"[ERROR:1@0.860] global loadsave.cpp:1409 imdecode_ imdecode_(''): can't read data\n\n",
    b"[ WARN:2@0.863] global grfmt_tiff.cpp:122 TIFF_Warning\n",
    b"libpng error: IDAT: incorrect data check\n",
    b"TIFFFillStrip: Read error at scanline 42; got 360 bytes, expected 8064.\n",
    b"Corrupt JPEG data: 4 extraneous bytes before marker 0xd9\n",
    b"Huffman table 0x01 was not defined\n",
]


@pytest.mark.parametrize("seed", range(20))
def test_only_their_lines_are_left_out(seed: int) -> None:
    draw = random.Random(seed)
    lines, expected, before = [], [], b""
    for _ in range(40):
        line = draw.choice(OURS + DECODERS)
        if line == b"\n" and before in DECODERS:
            continue  # one that OpenCV ends its lines with would be taken for it
        lines.append(line)
        expected += [line] if line in OURS else []
        before = line
    lines.append(b"a last line without an end")
    out = io.BytesIO()
    pass_on(io.BytesIO(b"".join(lines)), out)
    assert out.getvalue() == b"".join([*expected, lines[-1]])


def damaged(count: int) -> list[bytes]:
    """Pictures of common kinds, changed or cut at random places."""
    draw, pixels = random.Random(0), np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    whole = []
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_blocks": 3}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        whole.append(buffer.getvalue())
    pictures = []
    for _ in range(count):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.choice((1, 2, 10))):
            data[int(len(data) * draw.random() ** 3)] = draw.randrange(256)
        pictures.append(bytes(data[: draw.randrange(100, len(data))] if draw.random() < 0.3 else data) + b"\xff\xd9")
    return pictures


def test_no_decoder_is_heard_but_crashes_are(tmp_path: Path) -> None:
    for number, data in enumerate(damaged(150)):
        (tmp_path / f"{number:03}").write_bytes(data)
    code = f"""
import os, sys
from pathlib import Path
import numpy as np
from fastflower.data.decoding import ShapeDecoder
from fastflower.data.soundness import has_header
from fastflower.runtime.output import without_decoders

with without_decoders():
    decoder = ShapeDecoder(1)
    for path in sorted(Path({str(tmp_path)!r}).iterdir()):
        if has_header(data := np.fromfile(path, np.uint8)):
            decoder.shapes([data])
    print("Python's own", file=sys.stderr)
    os.write(2, b"a library's\\n")
print("afterwards", file=sys.stderr)
with without_decoders():
    os.write(2, b"last words\\n")
    os.abort()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -6, done.stderr
    assert sorted(done.stderr.splitlines()[:2]) == ["Python's own", "a library's"]  # which ways of their own
    assert done.stderr.splitlines()[2:] == ["afterwards", "last words"]


def test_commands_name_the_record_instead(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"train": 24, "val": 8})
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[data.index(b"IDAT") + 4] ^= 0xFF  # its structure is whole
    records = [example(100 + i, i % 3) for i in range(4)]
    records[1]["image"] = bytes(data)
    file = root / "tfrecords-jpeg-40x40/train/02-40x40-4.tfrec"
    write_tfrecord(file, records)
    for words, code in (
        (["data", "check", root], 1),
        ([*train_arguments(root, tmp_path / "run"), "--train.epochs", 1], 2),
        (["data", "stats", root], 2),
        (["data", "check", root, "--debug"], 1),
    ):
        done = in_process(tiny_worker.main, *words)
        assert done.code == code, done.err
        assert f"{file}, record 1 (id 000101)" in done.out + done.err
        if "--debug" in words:
            assert "png" in done.err
        else:
            assert len(done.err.splitlines()) == (code == 2)


def test_functions_of_python_name_the_record_instead(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", {"train": 24, "val": 8})
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(buffer, "BMP")
    records = [example(100 + i, i % 3) for i in range(4)]
    records[1]["image"] = buffer.getvalue()[:2000]
    file = root / "tfrecords-jpeg-40x40/train/02-40x40-4.tfrec"
    write_tfrecord(file, records)
    code = f"""
import fastflower
config = fastflower.load_config(settings={train_settings(root, epochs=1)!r})
for call in (lambda: fastflower.train(config, {str(tmp_path / "run")!r}), lambda: fastflower.load_data(config)):
    try:
        call()
    except fastflower.UserError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count(f"{file}, record 1 (id 000101)") == 2
    assert done.stderr == ""
