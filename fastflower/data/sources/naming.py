"""What names of files and folders say: which split is meant, and what nobody put there as data."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastflower.config import SPLITS
from fastflower.errors import UserError

_SPLIT = re.compile(
    r"((?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing))"
    r"([-_ ]?(set|split|data|images|pictures|photos))?",
    re.IGNORECASE,
)
# What systems, archives and network drives put beside files; names that begin with a dot are passed over too.
_FOREIGN = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir", "#recycle"),
    *("$recycle.bin", "system volume information", "lost+found"),
}


def split_meant(name: str) -> str | None:
    """The split that a folder's name stands for, whatever its case: valid, Validation and val_images are val."""
    match = _SPLIT.fullmatch(name)
    return match and next(split for split in SPLITS if match[split])


def is_foreign(name: str) -> bool:
    """Whether a name is hidden, or of what a system puts beside the user's files."""
    return name[0] == "." or name.lower() in _FOREIGN


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without foreign ones.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not is_foreign(entry.name) and entry.is_dir())
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> UserError:
    """The sentence for a file or folder that the system refuses to read."""
    return UserError(f"{error.filename} cannot be read ({error.strerror}): mend it or take it away.")


def folders_by_split(root: Path) -> dict[str, list[Path]]:
    """All folders in `root` whose names mean a split, by split, in the order of `SPLITS`; a link to another of them
    counts once.

    Raises:
        UserError: `root` cannot be read.
    """
    meant = [(name, split) for name in folders_in(root) if (split := split_meant(name))]
    folders: dict[str, list[Path]] = {}
    for split in SPLITS:
        # of two names of the same folder the split's own stays, which comes last
        names = sorted((name for name, of in meant if of == split), key=lambda name: name == split)
        own = {os.path.realpath(root / name): root / name for name in names}
        if own:
            folders[split] = list(own.values())
    return folders


def one_each(folders: dict[str, list[Path]]) -> dict[str, Path]:
    """The folder of each split, where each has but one.

    Raises:
        UserError: two folders mean the same split.
    """
    for split, paths in folders.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in sorted(paths))
            raise UserError(
                f"{paths[0].parent} has the folders {names}, which both mean {split}: put all of it into one of them, "
                "or rename or move the other."
            )
    return {split: path for split, (path,) in folders.items()}


def other_names(folders: dict[str, Path]) -> list[str]:
    """A sentence on the folders that are taken as splits by another name than the split's own."""
    taken = [f"{path.name} is {split}" for split, path in folders.items() if path.name != split]
    return [f"Folders as splits: {', '.join(taken)}."] if taken else []


def require_text(path: Path) -> None:
    """Raise UserError where a path is no UTF-8, so that nothing could be written about it."""
    if not _is_text(str(path)):
        bad = next(place for place in reversed([path, *path.parents]) if not _is_text(place.name))
        shown = os.fsencode(bad).decode("utf-8", "backslashreplace")
        raise UserError(
            f"{shown} has a name that is no UTF-8 text (its bytes are shown as \\x..): rename it; "
            f"`convmv -f latin1 -t utf8 -r --notest {bad.parent}` renames all that are Latin-1."
        )


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)  # as Python reads bytes that are none
