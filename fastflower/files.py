"""Files that are either whole or absent, and the user's cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import secrets
import shlex
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fastflower.errors import UserError

# Where other libraries keep what they make, below the home folder, and the variable that names another place.
_KEPT_AT_HOME = {"MPLCONFIGDIR": ".config/matplotlib", "TORCH_HOME": ".cache/torch", "TRITON_HOME": ".triton"}


def cache_dir() -> Path:
    """The user's cache folder: $FASTFLOWER_CACHE, else $XDG_CACHE_HOME/fastflower, else ~/.cache/fastflower.

    What is named is taken as it is. Where the others cannot be written, as in a container without a home folder, it is
    a private folder among the temporary files.

    Raises:
        UserError: $FASTFLOWER_CACHE is below a home folder that nobody knows.
    """
    if named := os.environ.get("FASTFLOWER_CACHE"):
        try:
            return Path(named).expanduser()
        except RuntimeError as error:
            raise UserError(f"FASTFLOWER_CACHE is {named}, but there is no such home folder: give a path.") from error
    return home_cache() or _private_folder()


def home_cache() -> Path | None:
    """The cache folder at home; None where it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastflower"
    except RuntimeError:  # neither a variable nor the system knows a home
        return None
    return folder if is_writable(folder) else None


def as_word(path: str | Path) -> str:
    """A path as it is written in a shell's command, also where there are spaces in it."""
    return shlex.quote(str(path))


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made where it is not there yet."""
    return os.access(existing_part(folder), os.W_OK | os.X_OK) and existing_part(folder).is_dir()


def existing_part(folder: Path) -> Path:
    """The folder itself, or the one above it that is there."""
    return next(part for part in (folder.absolute(), *folder.absolute().parents) if os.path.exists(part))


def _private_folder() -> Path:
    """A folder of this user's among the temporary files; it is another one where somebody made it for them.

    It will hold code to run, so that nobody else may write there.
    """
    folder = Path(tempfile.gettempdir()) / f"fastflower-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return folder
    return Path(_folder_of_process().name)


@functools.cache
def _folder_of_process() -> tempfile.TemporaryDirectory[str]:
    """A new one, which goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fastflower-")


def lend_cache() -> None:
    """Where the home folder cannot be written, name places in our cache to the libraries that would write there.

    What the user has named, or is there already, stays as it is.
    """
    if home_cache():
        return
    with contextlib.suppress(UserError, OSError):  # whoever needs a place will say that there is none
        ours = cache_dir() if is_writable(cache_dir()) else _private_folder()
        for variable, usual in _KEPT_AT_HOME.items():
            if not os.environ.get(variable) and not os.path.isdir(os.path.expanduser(f"~/{usual}")):
                os.environ[variable] = str(ours / Path(usual).name.removeprefix("."))


def digest(*parts: bytes | memoryview, size: int = 8) -> bytes:
    """A digest of so many bytes: the same for the same bytes, which the parts are one after another."""
    hashed = hashlib.blake2b(digest_size=size)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


@functools.cache
def code_digest(*sources: str) -> str:
    """Changes when one of these source files does.

    It goes into the name of whatever their code leaves in the cache, so that what an earlier version made is never
    taken for this one's.
    """
    return digest(*(Path(source).read_bytes() for source in sources), size=6).hex()


def require_writable(path: Path) -> None:
    """Find out, before the work whose result goes to `path`, whether it can be written; its folder is made.

    Raises:
        UserError: it is a folder.
        OSError: its folder cannot be made or written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of `atomic_write` to `path`; what another one is writing now stays."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}.tmp"):
        with contextlib.suppress(OSError), temporary.open("rb") as file:  # it may be gone, or locked by who writes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, to write and read; when the block ends without an error it is synced and
    takes the name `path`.

    A crash, a full disk or a second writer leaves either the old file or the new one, never a part of one.

    Raises:
        OSError: the folder cannot be written or the disk is full; it names `path`, which is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        # opened here, not by tempfile, so that the user's umask decides who may read it
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # see `remove_temporaries`
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """A plain value as JSON, with null for NaN and infinity, which JSON does not have and strict readers refuse."""
    return json.dumps(_defined(value), allow_nan=False, indent=indent, sort_keys=sort_keys)


def _defined(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _defined(item) for key, item in value.items()}
    return [_defined(item) for item in value] if isinstance(value, list | tuple) else value
