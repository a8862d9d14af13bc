"""The layouts on disk that data sets come in, one file each, and which of them a folder has."""

from __future__ import annotations

from pathlib import Path

from fastflower.data.sources.folder import ClassFolders
from fastflower.data.sources.kaggle import SizedTFRecords
from fastflower.data.sources.layout import Layout, one_of
from fastflower.data.sources.naming import require_text
from fastflower.errors import UserError

_RECOGNIZED: tuple[Layout, ...] = (SizedTFRecords(),)  # by what only they hold, in this order
LAYOUTS: tuple[Layout, ...] = (*_RECOGNIZED, ClassFolders(besides=_RECOGNIZED))  # the last takes any folder


def layout_of(root: Path) -> Layout:
    """The layout of a data folder: the first that holds it.

    Raises:
        UserError: it is no folder or cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"--data.root {root} is not a folder: {one_of(LAYOUTS)}.")
    require_text(root.absolute())
    try:
        return next(layout for layout in LAYOUTS if layout.holds(root))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from error
