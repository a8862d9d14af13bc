"""Pictures that are files of their own, whatever names them: folders, or a command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastflower.arrays import Ints, Strings
from fastflower.data.records import NO_LABEL, Records
from fastflower.data.sources import tfrecord
from fastflower.data.stamp import Stamp, stamp_of
from fastflower.errors import UserError


def picture_files(paths: Sequence[Path]) -> Records:
    """Picture files that are named one by one, without classes; a path is the id.

    Raises:
        UserError: one cannot be read, is not a picture's file, or is given twice.
    """
    if not paths:
        raise UserError("--images names no picture: give one or more files.")
    for path, times in Counter(paths).items():
        if path.is_dir():
            raise UserError(f"{path} is a folder: give picture files, or a data set's folder as --data.root.")
        if path.suffix in tfrecord.SUFFIXES:
            raise UserError(f"{path} holds records and is no picture: give its data set's folder as --data.root.")
        if times > 1:
            raise UserError(f"{path} is given twice: give each picture once.")
    stamps = [stamp_of(path) for path in paths]
    ids, labels = np.array([str(path) for path in paths]), np.full(len(paths), NO_LABEL)
    return records_of_files(paths, stamps, ids, labels, mend="give its data set's folder as --data.root")


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
