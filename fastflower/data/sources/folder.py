"""Class folders: pictures as files, in ROOT/{train,val}/CLASS/ and ROOT/test/, or in ROOT/CLASS/ alone.

Each picture is a record of its own file. Its name's extension says that it is a picture, its content which kind; where
the extension says nothing, its first bytes do. Names are the same whatever their Unicode form (NFC is taken).
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastflower.config import DataConfig
from fastflower.data.names import composed
from fastflower.data.records import NO_LABEL, Progress, Records
from fastflower.data.sources.files import SUFFIXES, records_of_files, why_no_picture
from fastflower.data.sources.layout import HIDDEN, NAMES_FILE, Inventory, Layout, LeftOuts, Loaded, Problem, one_of
from fastflower.data.sources.naming import (
    folders_by_split,
    folders_in,
    is_foreign,
    one_each,
    other_names,
    require_text,
    split_meant,
    unreadable,
)
from fastflower.data.stamp import Stamp
from fastflower.errors import UserError
from fastflower.files import as_word

FORM = "pictures as train/CLASS/*.jpg, val/CLASS/*.jpg and test/*.jpg, or as CLASS/*.jpg alone"

Picture = tuple[str, Stamp]  # path below the split's folder, with "/"


@dataclass(frozen=True)
class ClassFolders(Layout):
    """Pictures as files, in folders named after their classes."""

    besides: tuple[Layout, ...]  # what else the folder might have been, for the sentences that refuse it

    form = FORM
    ids_are_of_split = True
    renaming = "correct the folder's name"
    holds_out = True

    def holds(self, root: Path) -> bool:
        """Any folder; what it lacks is said when it is loaded."""
        return True

    def splits(self, root: Path) -> list[str]:
        """Those that have a folder."""
        return [*split_folders(root)] or ["train"]

    def load(self, root: Path, split: str, data: DataConfig) -> Loaded:
        """See `load_folder`."""
        return self._load(root, split)

    def survey(self, root: Path) -> Inventory:
        """What lies beside the splits' folders, and which folders are taken for what."""
        folders = split_folders(root)
        if not folders:
            flat = [path.name for paths in folders_by_split(root).values() for path in paths]
            notes = [f"{root / name} is taken as a class: it holds no folders of classes." for name in flat]
            return Inventory(notes=(*notes, *_splits_beside(root)))
        left_out = LeftOuts()
        with os.scandir(root) as entries:
            for entry in entries:
                if is_foreign(entry.name):
                    left_out.add(entry.path, kind=HIDDEN)
                elif not (split_meant(entry.name) and entry.is_dir()) and entry.name != NAMES_FILE:
                    left_out.add_entry(entry, "beside the splits")
        without_train = _without_train(root, folders)
        return Inventory(left_out.total(), (*other_names(folders), *([without_train] if without_train else [])))

    def likely_mend(self, root: Path) -> str | None:
        """By where wrappings, each the only folder of another, end: at folders of classes, or at splits."""
        folders = split_folders(root)
        outer = folders.get("train", root)
        *_, inner = _inward(outer)
        if inner == outer or len(folders_in(inner)) < 2:
            return None
        move = f"move its folders into {outer}" if len(folders) > 1 else f"give --data.root {as_word(inner)}"
        return f"its classes seem to be in {inner}: {move}"

    def inspect(self, root: Path, follow: Callable[[str], Progress]) -> tuple[dict[str, Loaded], list[Problem]]:
        """The pictures of each split, also where classes of train are empty."""
        loaded, problems = {}, []
        for split in self.splits(root):
            empty: list[str] = []
            try:
                loaded[split] = self._load(root, split, empty)
            except UserError as error:
                place = split_folders(root).get(split, root)
                problems.append(Problem("file", split, str(place), None, "", str(error)))
            else:
                place = split_folders(root).get(split, root)
                problems += [
                    Problem("file", split, str(place / name), None, "", without_pictures(place / name))
                    for name in empty
                ]
        return loaded, problems

    def _load(self, root: Path, split: str, empty: list[str] | None = None) -> Loaded:
        try:
            return load_folder(root, split, empty, expected=one_of((*self.besides, self)))
        except NoPicturesError as error:
            wrapped, above = [*_inward(root)], root.resolve().parent
            near = [*wrapped, above] if split_meant(root.resolve().name) and os.access(above, os.R_OK) else wrapped
            held = [folder for folder in near if any(layout.holds(folder) for layout in self.besides)]
            likely = held[0] if held else wrapped[-1]
            if held or (likely != root and len(folders_in(likely)) > 1):
                mend = f"give --data.root {as_word(likely)}"
                raise UserError(f"{error} Its data seem to be in {likely}: {mend}.") from error
            raise


class NoPicturesError(UserError):
    """A split's folder has none."""


def split_folders(root: Path) -> dict[str, Path]:
    """Where the pictures of each split are; empty where all of `root` is train.

    Names that mean a split (`split_meant`) may be those of classes too, such as valid beside invalid, or train beside
    car. Beside other folders train and val divide `root` only if one of them holds folders, as splits have classes.
    Whether a folder test beside classes is one of them there is no telling, and so it is not (`_without_train`).

    Raises:
        UserError: two folders mean the same split, or one cannot be read.
    """
    folders = folders_by_split(root)
    if not folders or "test" in folders or not _classes_beside(root):
        return one_each(folders)
    divides = any(folders_in(path) for paths in folders.values() for path in paths)
    return one_each(folders) if divides else {}


def _classes_beside(root: Path) -> list[str]:
    return [name for name in folders_in(root) if not split_meant(name)]


def _without_train(root: Path, folders: dict[str, Path]) -> str | None:
    """The sentence for splits without train beside what may be classes; None where there is no such folder."""
    classes = _classes_beside(root)
    if "train" in folders or not classes:
        return None
    too = "".join(f"; {path.name} too, if it is a class" for path in folders.values() if not folders_in(path))
    return (
        f"{root} has no folder train beside {', '.join(path.name for path in folders.values())}: move the folders of "
        f"classes ({_some(classes)}) into {root / 'train'}{too}."
    )


def load_folder(
    root: Path, split: str, empty: list[str] | None = None, *, expected: str = f"a data folder holds {FORM}"
) -> Loaded:
    """Index the pictures of a split, sorted by path, with the names of their classes by label.

    A picture's id is its path below the split's folder, without the extension unless two differ in nothing else. Test
    pictures need no class folder, and have no label without one. Hidden files are left alone; links are followed.

    Args:
        root: the data set's folder.
        split: train, val or test.
        empty: takes the names of class folders of train without a picture; None = they are an error.
        expected: what a data folder holds, for the errors.

    Raises:
        UserError: there is no such split, no picture in it or in a class of train, a picture of train or val outside
            the class folders, a name that is no text or twice, splits within classes, or something cannot be read.
    """
    folders = split_folders(root)
    if folders and split == "train" and (sentence := _without_train(root, folders)):
        raise UserError(sentence)
    if split not in (folders or ["train"]):
        raise UserError(f"{root} has no folder {split}: {expected}.")
    folder, left_out = folders.get(split, root), LeftOuts()
    try:
        pictures = sorted(_pictures(str(folder), left_out))
        hollow = set(folders_in(folder)) - {path.partition("/")[0] for path, _ in pictures}
    except OSError as error:
        raise unreadable(error) from error
    if not all(path.isascii() for path, _ in pictures):
        pictures.sort(key=lambda picture: composed(picture[0]))  # the same order whatever the form of names
    beside = [path for path, _ in pictures if "/" not in path]
    if beside and split != "test":
        raise UserError(_outside(root, folder, beside[0], expected))
    if not pictures:
        others = Inventory(left_out.total()).left_out_line(10_000)
        raise NoPicturesError(
            f"{folder} holds no pictures ({', '.join(SUFFIXES)}): {expected}.{f' {others}' if others else ''}"
        )
    if hollow and split == "train":
        if empty is None:
            raise UserError(without_pictures(folder / min(hollow)))
        empty += sorted(hollow)
    records, names = _records(folder, pictures)
    notes = _depth_notes(folder, [path for path, _ in pictures]) if split != "test" else []
    return Loaded(records, names, Inventory(left_out.total(), tuple(notes)))


def without_pictures(folder: Path) -> str:
    """The sentence for a class's folder that is empty."""
    left_out = LeftOuts()
    _pictures(str(folder), left_out)
    others = Inventory(left_out.total()).left_out_line(10_000)
    more = f" {others}" if others else ""
    return f"{folder} holds no pictures ({', '.join(SUFFIXES)}): fill it or take it away.{more}"


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


def _inward(folder: Path) -> Iterator[Path]:
    """The folder, and as long as it has nothing in it but one folder of folders, that one."""
    yield folder
    seen = {os.path.realpath(folder)}  # a link may lead up again
    while len(inner := folders_in(folder)) == 1 and folders_in(folder / inner[0]):
        if os.path.realpath(folder / inner[0]) in seen:
            break
        folder /= inner[0]
        seen.add(os.path.realpath(folder))
        yield folder


def _splits_beside(root: Path) -> list[str]:
    """A sentence where `root` itself is named as a split, and others are beside it."""
    place = root.resolve()
    if split_meant(place.name) != "train" or not os.access(place.parent, os.R_OK):
        return []
    others = [
        path.name for split, paths in folders_by_split(place.parent).items() if split != "train" for path in paths
    ]
    said = f"{', '.join(others)} beside {root} {'is' if len(others) == 1 else 'are'} not used"
    return [f"{said}: --data.root {as_word(place.parent)} takes all of it."] if others else []


def _outside(root: Path, folder: Path, loose: str, expected: str) -> str:
    """The sentence for a picture that is in no class's folder, perhaps since its folder is a class itself."""
    place = root.resolve()
    siblings: list[str] = []
    if root == folder and os.access(place.parent, os.R_OK) and not folders_in(root):
        siblings = [name for name in folders_in(place.parent) if name != place.name]
    with_pictures = [name for name in siblings[:100] if _has_picture(place.parent / name)]  # of a home, not all
    if with_pictures:
        names = _some(sorted([place.name, *with_pictures]))
        return (
            f"{folder / loose} is in no class's folder: if {place.name} is a class itself, give --data.root "
            f"{as_word(place.parent)}, whose folders ({names}) are then the classes; else move it into one "
            f"({expected})."
        )
    return f"{folder / loose} is in no class's folder: move it into one ({expected})."


def _has_picture(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(SUFFIXES) and not is_foreign(entry.name) for entry in entries)
    except OSError:
        return False


def _pictures(
    folder: str, left_out: LeftOuts, below: str = "", above: tuple[tuple[int, int], ...] = ()
) -> list[Picture]:
    """All picture files below `folder`; a link to a folder that it lies in leads nowhere new."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return []
    above = (*above, (status.st_dev, status.st_ino))
    pictures: list[Picture] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if is_foreign(name):
                left_out.add(entry.path, kind=HIDDEN)
            elif entry.is_dir():
                pictures += _pictures(entry.path, left_out, f"{below}{name}/", above)
            elif name.lower().endswith(SUFFIXES):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    pictures.append((below + name, Stamp.of(status)))
                else:
                    left_out.add(entry.path, "no regular file")
            elif below or name != NAMES_FILE:
                why = why_no_picture(entry)
                if why is None:
                    pictures.append((below + name, Stamp.of(entry.stat())))
                else:
                    left_out.add(entry.path, why)
    return pictures


def _depth_notes(folder: Path, paths: Sequence[str]) -> list[str]:
    """A sentence where all pictures lie deeper than in the classes' folders, which may be others then.

    Raises:
        UserError: folders in a class's folder are splits.
    """
    deep = [path.split("/", 2) for path in paths if path.count("/") > 1]
    inner: dict[str, set[str]] = defaultdict(set)
    for name, within, _ in deep:
        inner[name].add(within)
    for name, folders in sorted(inner.items()):
        splits = [within for within in sorted(folders) if split_meant(within)]
        if len({split_meant(within) for within in splits}) > 1:
            place = folder / name
            mend = f"give --data.root {as_word(place)}"
            if len({path.partition("/")[0] for path in paths}) > 1:
                mend = f"move what they hold into {folder / splits[0] / name} and so on"
            raise UserError(f"{place} holds splits ({', '.join(splits)}) in the place of a class: {mend}.")
    if len(inner) > 1 and len(deep) == len(paths):
        name = min(inner)
        return [
            f"Classes are the {len(inner)} folders in {folder}; all pictures are in folders of theirs, such as "
            f"{name}/{min(inner[name])}."
        ]
    return []


def _records(folder: Path, pictures: list[Picture]) -> tuple[Records, list[str]]:
    stored, stamps = zip(*pictures, strict=True)
    for path in stored:
        if not path.isascii():
            require_text(folder / path)
    paths = [composed(path) for path in stored]
    if twice := [k for k, (one, other) in enumerate(pairwise(paths)) if one == other]:
        raise UserError(
            f"{folder / stored[twice[0]]} is there twice, by names that differ in their Unicode form alone: "
            "rename or remove one."
        )
    stems = np.array([path[: path.rindex(".")] if path.lower().endswith(SUFFIXES) else path for path in paths])
    _, same, counts = np.unique(stems, return_inverse=True, return_counts=True)
    classes = [path.partition("/")[0] if "/" in path else "" for path in paths]
    names = sorted(set(classes) - {""})
    index = {name: label for label, name in enumerate(names)} | {"": NO_LABEL}
    ids, labels = np.where(counts[same] > 1, paths, stems), np.array([index[name] for name in classes], np.int64)
    files = [folder / path for path in stored]
    return records_of_files(files, stamps, ids, labels, mend="put it into its class's folder"), names
