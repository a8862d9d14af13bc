"""Pictures that are files of their own, whatever names them: folders, or a command."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastflower.arrays import Ints, Strings
from fastflower.data.records import Records
from fastflower.data.stamp import Stamp

# Names that say that a file is a picture, in any case; its content says which kind.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".avif", ".heic", ".heif", ".hif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
# Names that say the contrary. Files that are named otherwise, or not at all, are known by how they begin.
_NO_PICTURES = (
    *(".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".htm", ".yaml", ".yml", ".log", ".pdf"),
    *(".npy", ".npz", ".mat", ".h5", ".pt", ".pth", ".parquet", ".zip", ".gz", ".tar", ".tgz", ".rar", ".7z", ".py"),
    *(".ipynb", ".doc", ".docx", ".xls", ".xlsx", ".mp4", ".mov", ".avi", ".aae", ".xmp"),
)
# Pictures of kinds that are not read, where SUFFIXES lacks them.
_OTHER_PICTURES = (
    *(".jxl", ".svg", ".psd", ".ico", ".tga", ".exr", ".eps", ".dng"),
    *(".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
# How files begin, by one of the names of such pictures; what has none in SUFFIXES is not read.
_BEGINNINGS = {
    ".jpg": rb"\xff\xd8\xff",
    ".png": rb"\x89PNG\r\n\x1a\n",
    ".webp": rb"RIFF....WEBP",
    ".tif": rb"II\*\0|MM\0\*",
    ".bmp": rb"BM....\0\0\0\0",
    ".jp2": rb"\0\0\0\x0cjP  \r\n\x87\n",
    ".j2k": rb"\xff\x4f\xff\x51",
    ".ppm": rb"P[1-6]\s+(\d|#)",
    ".gif": rb"GIF8[79]a",
    ".avif": rb"....ftypavi[fs]",
    ".heic": rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)",
}
_BEGINNING = re.compile(b"|".join(start for name, start in _BEGINNINGS.items() if name in SUFFIXES), re.DOTALL)
_HEAD = 16  # bytes that tell
NOT_READ = "not read"  # of a picture whose kind is none that can be


def why_no_picture(entry: os.DirEntry[str] | Path) -> str | None:
    """Why what SUFFIXES does not name is left out, "" where its extension says it; None where it is a picture, by its
    first bytes. A file whose name says that it is something else is not opened.
    """
    name = entry.name.lower()
    if name.endswith(_NO_PICTURES):
        return ""
    if not entry.is_file():
        return "no regular file"
    try:
        with open(os.fspath(entry), "rb", buffering=0) as file:
            begins = _BEGINNING.match(file.read(_HEAD))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if begins else NOT_READ if name.endswith(_OTHER_PICTURES) else ""


def records_of_files(
    files: Sequence[Path], stamps: Sequence[Stamp], ids: Strings, labels: Ints, *, mend: str
) -> Records:
    """A record for each of some files, all of which it is.

    Args:
        files: of one picture each.
        stamps: theirs.
        ids: the pictures', [n].
        labels: the pictures', [n]; NO_LABEL where there is none.
        mend: how a picture gets a label, for the sentence that misses it.
    """
    return Records(
        files=tuple(files),
        stamps=tuple(stamps),
        counts=(1,) * len(files),
        counts_by_name=(None,) * len(files),
        sides=(None,) * len(files),
        mends=(mend,) * len(files),
        file=np.arange(len(files)),
        number=np.zeros(len(files), np.int64),
        offset=np.zeros(len(files), np.int64),
        length=np.array([stamp.size for stamp in stamps], np.int64),
        ids=ids,
        labels=labels,
    )
