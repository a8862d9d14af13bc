"""Pictures that somebody names: files, folders and patterns, of which some may be no pictures."""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastflower.arrays import Bytes, Strings
from fastflower.data.contents import contents_of, examined
from fastflower.data.converted import UnreadableError
from fastflower.data.decoding import BATCH, ShapeDecoder
from fastflower.data.records import NO_LABEL, Progress, Records, read_image
from fastflower.data.soundness import convert, is_cut_off
from fastflower.data.sources.files import NOT_READ, SUFFIXES, records_of_files, why_no_picture
from fastflower.data.sources.layout import HIDDEN, NO_EXTENSION
from fastflower.data.sources.naming import is_foreign
from fastflower.data.sources.tfrecord import is_shard
from fastflower.data.stamp import Stamp
from fastflower.errors import UserError
from fastflower.evaluation.predictions import as_text

NAMED = 3  # files that a sentence names


@dataclass
class Pictures:
    """What was named."""

    taken: dict[str, Path] = field(default_factory=dict)  # by absolute path: below what was named, as it was
    others: dict[str, str] = field(default_factory=dict)  # of folders and patterns, by absolute path: of which kind
    unreadable: dict[str, str] = field(default_factory=dict)  # what cannot be read or decoded, and why

    @property
    def paths(self) -> list[Path]:
        """Of all pictures, in the order in which they were named."""
        return [*self.taken.values()]

    @property
    def passed_over(self) -> Counter[str]:
        """How many other files folders and patterns hold, by extension."""
        return Counter(self.others.values())

    def take(self, path: Path) -> None:
        """A file that is named is a picture, whatever it is called."""
        place = os.path.abspath(path)
        self.taken.setdefault(place, path)
        self.others.pop(place, None)

    def take_by_name(self, path: Path) -> None:
        """A file of a folder or pattern is a picture if it is called so, or without such a name begins as one."""
        place, kind = os.path.abspath(path), path.suffix.lower() or NO_EXTENSION
        if is_foreign(path.name):
            kind = HIDDEN
        elif path.name.lower().endswith(SUFFIXES) or (why := why_no_picture(path)) is None:
            return self.take(path)
        elif why == NOT_READ:
            self.unreadable[as_text(str(path))] = "is a picture of a kind that is not read"
            return None
        if place not in self.taken:
            self.others[place] = kind
        return None

    def take_folder(self, folder: Path, above: tuple[tuple[int, int], ...] = ()) -> None:
        """All pictures below a folder, sorted; a link to a folder that it lies in leads nowhere new."""
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.unreadable[as_text(str(folder))] = _refused(error)
            return
        if (status.st_dev, status.st_ino) in above:
            return
        for entry in entries:
            path = folder / entry.name
            if os.path.isdir(path) and not is_foreign(entry.name):
                self.take_folder(path, (*above, (status.st_dev, status.st_ino)))
            else:
                self.take_by_name(path)


def find_pictures(given: Sequence[str | Path]) -> Pictures:
    """The pictures that are named by files, folders (and all folders in them) and patterns such as "photos/*.jpg".

    Each is taken once. Of folders and patterns files are taken that a data folder would have for pictures too, and not
    what is hidden; a file that is named is taken whatever it is. Links are followed.
    """
    pictures = Pictures()
    for name in given:
        text = os.path.expanduser(name)
        if os.path.isdir(text):
            pictures.take_folder(Path(text))
        elif os.path.lexists(text) or not glob.has_magic(text):
            pictures.take(Path(text))
        else:
            matches = _matches(text)
            if not matches:
                pictures.unreadable[as_text(text)] = "matches no file"
            for path in matches:
                if os.path.isdir(path):
                    pictures.take_folder(path)
                else:
                    pictures.take_by_name(path)
    return pictures


def _matches(pattern: str) -> list[Path]:
    """What a pattern matches, sorted; folders that are there mean themselves, whatever marks are in their names."""
    parts = Path(pattern).parts
    above = Path(parts[0]) if Path(pattern).is_absolute() else Path()
    while parts and (above / parts[0]).is_dir():
        above, parts = above / parts[0], parts[1:]
    return sorted(above / match for match in glob.glob(os.path.join(*parts), root_dir=above, recursive=True))


def _refused(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def read_pictures(pictures: Pictures, progress: Progress | None = None) -> Records:
    """Each file that is a picture by its bytes as a record without a class, whose id is its path.

    What cannot be read, is no picture or is cut off goes to `pictures.unreadable`.

    Raises:
        UserError: nothing of what was named is a picture.
    """
    stamps: dict[Path, Stamp] = {}
    for path in pictures.paths:
        status = _status(path)
        if isinstance(status, str):
            pictures.unreadable[as_text(str(path))] = status
        else:
            stamps[path] = Stamp.of(status)
    ids: Strings = np.array([as_text(str(path)) for path in stamps], np.str_)
    labels = np.full(len(stamps), NO_LABEL)
    records = records_of_files([*stamps], [*stamps.values()], ids, labels, mend="put it into a data set")
    try:
        records = examined(records, progress)
    except UserError:  # some cannot be read although they can be opened
        reasons = {i: encoded for i in range(len(records)) if isinstance(encoded := _read(records, i), str)}
        records = examined(leave_out(records, reasons, pictures), progress)
    unsound = np.flatnonzero(~contents_of(records).sound).tolist()
    records = leave_out(records, {index: _unsound(_read(records, index)) for index in unsound}, pictures)
    require_some(len(records), pictures)
    return records


def require_some(count: int, pictures: Pictures) -> None:
    """Raise UserError where so many pictures are none."""
    if count:
        return
    passed = f" ({passed_over(pictures)})" if pictures.passed_over else ""
    reasons = [f"{name} {why}" for name, why in pictures.unreadable.items()]
    if not reasons:
        raise UserError(f"nothing of what is named is called as pictures are{passed}: name files of {_KINDS}.")
    more = f", and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    raise UserError(f"{', '.join(reasons[:NAMED])}{more}{passed}: name pictures that can be read.")


_KINDS = ", ".join(SUFFIXES)


def passed_over(pictures: Pictures) -> str:
    """In words what else folders and patterns held: "4 other files were passed over (3 .txt, 1 hidden)"."""
    count = pictures.passed_over.total()
    kinds = ", ".join(f"{number} {kind}" for kind, number in pictures.passed_over.most_common())
    return f"{count} other file{'s were' if count > 1 else ' was'} passed over ({kinds})"


def _status(path: Path) -> os.stat_result | str:
    """What the file system says of a file, or why its bytes cannot be those of a picture."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return _refused(error)
    except ValueError as error:
        return f"is no file's name ({error})"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    if is_shard(path.name):
        return "holds records, and is no picture: predict a split of its data set"
    if not status.st_size:
        return "is empty"
    return status if os.access(path, os.R_OK) else "cannot be read (Permission denied)"


def _read(records: Records, index: int) -> Bytes | str:
    """A record's encoded picture, or why it cannot be read."""
    try:
        return read_image(records, index)
    except UserError as error:
        reason, _, _ = str(error).removeprefix(records.describe(index)).partition(": check")
        return reason.strip(" .")


def _unsound(encoded: Bytes | str) -> str:
    """Why encoded bytes that are not sound are none of a picture."""
    if isinstance(encoded, str):
        return encoded
    try:
        convert(encoded)
    except UnreadableError as error:
        if str(error) and not is_cut_off(encoded):
            return f"cannot be decoded: {error}"
    return "is cut off" if is_cut_off(encoded) else "is no picture"


def faults(records: Records) -> dict[int, str]:
    """Which of some records cannot be read or decoded now, and why: each is read and decoded."""
    reasons: dict[int, str] = {}
    decoder = ShapeDecoder(threads=1)
    for start in range(0, len(records), BATCH):
        sound: dict[int, Bytes] = {}
        for index in range(start, min(start + BATCH, len(records))):
            encoded = _read(records, index)
            if isinstance(encoded, str):
                reasons[index] = encoded
                continue
            try:
                sound[index] = convert(encoded)
            except UnreadableError:
                reasons[index] = _unsound(encoded)
        if sound:
            decoded: list[bool] = [bool(shape.all()) for shape in decoder.shapes([*sound.values()])]
            reasons |= {index: "cannot be decoded" for index, good in zip(sound, decoded, strict=True) if not good}
    return reasons


def leave_out(records: Records, reasons: dict[int, str], pictures: Pictures) -> Records:
    """The records but those that have a reason, which goes to what is unreadable."""
    pictures.unreadable |= {str(records.ids[index]): reason for index, reason in reasons.items()}
    return records.select(np.delete(np.arange(len(records)), [*reasons]))
