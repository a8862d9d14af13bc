"""Encoded pictures from disk, a batch at a time, without Python's lock.

Training launches operations with that lock, and waits whenever the loader's thread has it. So a batch is one call of
compiled code, which opens, looks at and reads files, and of each record it is checked but once that it is a picture.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numba import types

from fastflower.arrays import Bools, Bytes, Ints
from fastflower.data.compiled import compiled, is_tested
from fastflower.data.converted import UnreadableError
from fastflower.data.decoding import read_picture, undecodable
from fastflower.data.memory import Memory
from fastflower.data.records import KEPT_OPEN, OpenFile, Records, open_kept
from fastflower.data.soundness import convert, is_sound, needs_conversion
from fastflower.data.stamp import Stamp

CONVERTED_TIMES = 25  # bytes of a pixmap for each byte of HEIC or AVIF, roughly
ALIGNED = 64  # bytes: no two pictures share a line of a cache

# Functions of the C library: open(2), pread(2), close(2) and statx(2), whose structure is the same on all machines.
_open: Any = types.ExternalFunction("open", types.int32(types.uintp, types.int32))
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))
_close: Any = types.ExternalFunction("close", types.int32(types.int32))
_statx: Any = types.ExternalFunction(
    "statx", types.int32(types.int32, types.uintp, types.int32, types.uint32, types.uintp)
)
_READ = os.O_RDONLY | os.O_CLOEXEC
_OF_DESCRIPTOR, _SIZE_AND_MTIME = 0x1000, 0x240  # AT_EMPTY_PATH, STATX_SIZE | STATX_MTIME
_STATX_NUMBERS, _SIZE, _SECONDS, _NANOSECONDS = 32, 5, 14, 15  # of 64 bits in the structure, and which these are


def known_sound(records: Records) -> Bools:
    """Which records are known to be pictures that are not cut off and that DALI reads as they are, [n]; to be noted
    there of others.
    """
    contents = records.contents
    return contents.examined & contents.sound & ~contents.converted if contents else np.zeros(len(records), np.bool_)


class Reader:
    """Reads records of one table; used by one thread at a time."""

    def __init__(self, records: Records, sound: Bools, threads: int = 1) -> None:
        """`sound` is `known_sound` of the records, which several readers may share; `threads` convert pictures."""
        self._records, self._sound, self._threads = records, sound, threads
        self._memory, self._most = Memory(), ALIGNED

    def sizes(self, indices: Ints) -> Ints:
        """About how many bytes the images of the records at `indices` take once they are read, [m]."""
        lengths, contents = self._records.length[indices], self._records.contents
        return np.where(contents.converted[indices], CONVERTED_TIMES * lengths, lengths) if contents else lengths

    def read(self, indices: Ints) -> list[Bytes]:
        """The images of the records at `indices` ([m] int64), encoded as DALI reads them, [length] each; see
        `read_picture`.

        Their memory is used again when nobody refers to any of them.

        Raises:
            UserError: names file and record of the first that cannot be read or is no picture.
        """
        lengths = self._records.length[indices]
        ends = np.cumsum(-(-lengths // ALIGNED) * ALIGNED)
        starts = np.concatenate(([0], ends[:-1]))
        self._most = max(self._most, int(ends[-1]))
        memory = self._memory.take((self._most,), np.uint8)
        as_indexed = self._fill(indices, starts, memory)
        encoded = [memory[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        to_convert = []
        for i in np.flatnonzero(~(as_indexed & self._sound[indices])).tolist():
            index = int(indices[i])
            if not as_indexed[i]:  # its file is another, or was written to, or cannot be read: it may say what is wrong
                encoded[i] = read_picture(self._records, index)
            elif needs_conversion(encoded[i]):
                to_convert.append(i)
            elif is_sound(encoded[i]):
                self._sound[index] = True
            else:
                raise undecodable((self._records, index))
        if to_convert:
            with ThreadPoolExecutor(self._threads, "convert") as threads:
                answers = list(threads.map(_converted, [encoded[i] for i in to_convert]))
            for i, answer in zip(to_convert, answers, strict=True):
                if isinstance(answer, UnreadableError):
                    raise undecodable((self._records, int(indices[i]))) from answer
                encoded[i] = answer
        return encoded

    def _fill(self, indices: Ints, starts: Ints, memory: Bytes) -> Bools:
        """Read the records' bytes to `starts` of the memory; of which it worked, their files being as indexed, [m]."""
        records, files = self._records, self._records.files
        numbers = records.file[indices].tolist()
        kept: dict[int, OpenFile | None] = {}
        if len(files) <= KEPT_OPEN:  # and referred to until they are read: another thread may drop them from the cache
            kept = {number: _kept(records, number) for number in set(numbers)}
        descriptors = [file.descriptor if (file := kept.get(number)) else -1 for number in numbers]
        paths = [b"" if number in kept else os.fsencode(files[number]) for number in numbers]
        path_ends = np.cumsum([len(path) + 1 for path in paths])
        as_indexed = np.zeros(len(numbers), np.bool_)
        read_pieces(
            np.frombuffer(b"\0".join(paths) + b"\0", np.uint8),
            np.concatenate(([0], path_ends[:-1])),
            np.array(descriptors),
            np.array([records.stamps[number].content for number in numbers]),
            records.offset[indices],
            records.length[indices],
            starts,
            memory,
            as_indexed,
        )
        return as_indexed


def _converted(encoded: Bytes) -> Bytes | UnreadableError:
    try:
        return convert(encoded)
    except UnreadableError as error:
        return error


def _kept(records: Records, number: int) -> OpenFile | None:
    """An open file of a table; None where it cannot be opened."""
    try:
        return open_kept(records.files[number], records.stamps[number])
    except OSError:
        return None


@compiled()
def read_without_lock(paths, path_starts, descriptors, contents, offsets, lengths, starts, memory, as_indexed):  # type: ignore[no-untyped-def]
    """Read m pieces of files.

    Args:
        paths: uint8, paths that end with a zero, one after another.
        path_starts: int64 [m], where in them the path of a piece's file begins.
        descriptors: int64 [m], of files that are open; -1 for those to open by their path.
        contents: int64 [m, 2], size (bytes) and time of the last modification (ns) of a piece's file as it should be.
        offsets: int64 [m], of the pieces in their files.
        lengths: int64 [m], of the pieces.
        starts: int64 [m], where in the memory they go.
        memory: uint8.
        as_indexed: bool [m], becomes true of those that were read from a file as it should be.
    """
    status = np.zeros(_STATX_NUMBERS, np.int64)
    no_path = np.zeros(1, np.uint8)
    for i in range(len(offsets)):
        descriptor = np.int32(descriptors[i])
        if descriptor < 0:
            descriptor = _open(paths.ctypes.data + path_starts[i], _READ)
        if descriptor < 0:
            continue
        done = np.int64(0)
        while done < lengths[i]:
            count = _pread(descriptor, memory.ctypes.data + starts[i] + done, lengths[i] - done, offsets[i] + done)
            if count <= 0:
                break
            done += count
        failed = _statx(descriptor, no_path.ctypes.data, _OF_DESCRIPTOR, _SIZE_AND_MTIME, status.ctypes.data)
        size, mtime_ns = status[_SIZE], status[_SECONDS] * 1_000_000_000 + (status[_NANOSECONDS] & 0xFFFFFFFF)
        as_it_should_be = failed == 0 and size == contents[i, 0] and mtime_ns == contents[i, 1]
        as_indexed[i] = done == lengths[i] and as_it_should_be
        if descriptors[i] < 0:
            _close(descriptor)


def read_plainly(
    paths: Bytes,
    path_starts: Ints,
    descriptors: Ints,
    contents: Ints,
    offsets: Ints,
    lengths: Ints,
    starts: Ints,
    memory: Bytes,
    as_indexed: Bools,
) -> None:
    """The same, call by call: for versions of Numba that the other was not tested with."""
    for i, (descriptor, start, length) in enumerate(zip(descriptors, starts, lengths, strict=True)):
        opened = descriptor < 0
        try:
            if opened:
                descriptor = os.open(paths[path_starts[i] :].tobytes().partition(b"\0")[0], _READ)
            done = os.preadv(descriptor, [memory[start : start + length].data], offsets[i])
            stamp = Stamp.of(os.fstat(descriptor))
        except OSError:
            continue
        finally:
            if opened and descriptor >= 0:
                os.close(descriptor)
        as_indexed[i] = done == length and stamp.content == tuple(contents[i].tolist())


read_pieces = read_without_lock if is_tested(numba.__version__) else read_plainly
