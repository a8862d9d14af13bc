"""Pictures that are named: files, folders and patterns, with all that lies in such folders."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.errors import UserError
from fastflower.evaluation.pictures import faults, find_pictures, passed_over, read_pictures
from tests.conftest import jpeg

# Names as people and cameras give them, and worse.
NAMES = [
    *("a.jpg", "B.JPEG", "c d.png", "-e.jpg", "f,g.webp", 'h"i.jpg', "j\nk.jpg", "l[1].jpg", "m*.jpg", "ü.jpg"),
    *("notes.txt", "Thumbs.db", "x.json", "README", ".hidden.jpg", ".DS_Store"),
]
FOLDERS = ["", "sub", "sub/deep [2]", "*", ".git", "-o", "album.jpg"]
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
SHOWN = sorted(name for name in NAMES if name.lower().endswith(PICTURES) and name[0] != ".")


def tree(root: Path, files: set[tuple[str, str]]) -> Path:
    root.mkdir()
    for folder, name in files:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(b"x")
    return root


@given(st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), max_size=20))
def test_a_folder_holds_what_is_called_as_pictures_are(
    tmp_path_factory: pytest.TempPathFactory, files: set[tuple[str, str]]
) -> None:
    root = tree(tmp_path_factory.mktemp("pictures") / "root", files)
    seen = {(folder, name) for folder, name in files if folder != ".git"}
    shown = {(folder, name) for folder, name in seen if name[0] != "." and name != "Thumbs.db"}
    wanted = {root / folder / name for folder, name in shown if name.lower().endswith(PICTURES)}
    others = Counter(Path(n).suffix or "without extension" for _, n in shown if not n.lower().endswith(PICTURES))
    hidden = len(seen) - len(shown) + (seen != files)  # a hidden folder is one
    pictures = find_pictures([root])
    assert set(pictures.paths) == wanted
    assert len(pictures.paths) == len(wanted)
    assert pictures.passed_over == others + Counter({"hidden or of the system": hidden})
    assert not pictures.unreadable
    # the same pictures named again, in other ways, are the same pictures
    again = find_pictures([*sorted(wanted), root, f"{root}/.", root / "../root", f"{root}/**"])
    assert again.paths == sorted(wanted)


def test_patterns_are_those_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {(folder, name) for folder in FOLDERS for name in NAMES}
    tree(tmp_path / "root", files)
    monkeypatch.chdir(tmp_path)

    def found(pattern: str) -> list[str]:
        return [str(path) for path in find_pictures([pattern]).paths]

    assert found("root/[ac]*.*") == ["root/a.jpg", *(f"root/album.jpg/{name}" for name in SHOWN), "root/c d.png"]
    assert found("root/sub/deep [[]2]/a.jpg") == found("root/sub/deep [2]/a.*") == ["root/sub/deep [2]/a.jpg"]
    assert found("root/l[1].jpg") == ["root/l[1].jpg"]  # a file of that name is meant
    assert found("root/*/a.jpg") == ["root/*/a.jpg"]
    assert found("root/sub/*.txt") == []
    assert find_pictures(["root/sub/*.txt"]).passed_over == {".txt": 1}
    deep = sorted(str(Path("root", folder, "B.JPEG")) for folder in FOLDERS if folder != ".git")
    assert found("root/**/B.JPEG") == deep
    monkeypatch.chdir("root/-o")
    assert found(".") == found("*") == SHOWN
    assert found("../-o/-e*") == ["../-o/-e.jpg"]
    assert find_pictures(["zz*.jpg"]).unreadable == {"zz*.jpg": "matches no file"}


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", {("sub", "a.jpg"), ("", "b.jpg")})
    (root / "sub/up").symlink_to(root)
    (root / "sub/other").symlink_to(tree(tmp_path / "other", {("", "c.jpg")}))
    assert [path.name for path in find_pictures([root]).paths] == ["b.jpg", "a.jpg", "c.jpg"]


def test_what_begins_as_a_picture_is_one_without_such_a_name(tmp_path: Path) -> None:
    contents = {"a": jpeg(40, 40), "b.x": jpeg(40, 40), "c.txt": jpeg(40, 40), "d": b"none", "e.psd": b"8BPS", "f": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    pictures = find_pictures([tmp_path])
    assert [path.name for path in pictures.paths] == ["a", "b.x"]
    assert pictures.passed_over == {".txt": 1, "without extension": 2}
    assert pictures.unreadable == {str(tmp_path / "e.psd"): "is a picture of a kind that is not read"}
    assert len(find_pictures([tmp_path, tmp_path / "c.txt"]).paths) == 3


def undecodable() -> bytes:
    """A PNG whose header and end are right, and whose pixels are none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (8).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"none") + chunk(b"IEND", b"")


def test_each_file_that_is_none_has_its_reason(tmp_path: Path) -> None:
    whole = jpeg(40, 40)
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html>",
        "cut.jpg": whole[:200],
        "a.tfrec": b"x",
        "list.txt": b"a.jpg",
    }
    for name, data in (bad | {"good.jpg": whole, "later.png": undecodable()}).items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    names = [*bad, "good.jpg", "pipe.jpg", "link.jpg", "round.jpg", "none.jpg", "later.png"]
    names += ["good.jpg/x.jpg", "n\0.jpg"]
    pictures = find_pictures([tmp_path / name for name in names])
    records = read_pictures(pictures)
    assert records.ids.tolist() == [str(tmp_path / "good.jpg"), str(tmp_path / "later.png")]
    reasons = {Path(path).name: reason for path, reason in pictures.unreadable.items()}
    assert reasons == {
        "empty.jpg": "is empty",
        "page.jpg": "is no picture",
        "cut.jpg": "is cut off",
        "a.tfrec": "holds records, and is no picture: predict a split of its data set",
        "list.txt": "is no picture",
        "pipe.jpg": "is no file",
        "link.jpg": "does not exist",
        "round.jpg": "cannot be read (Too many levels of symbolic links)",
        "none.jpg": "does not exist",
        "x.jpg": "cannot be read (Not a directory)",
        "n\0.jpg": "is no file's name (embedded null byte)",
    }
    assert faults(records) == {1: "cannot be decoded"}
    (tmp_path / "good.jpg").write_bytes(b"")
    assert faults(records)[0] == "cannot be read: the file has changed since it was indexed"


def test_what_cannot_be_opened_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "root", {("", "a.jpg"), ("shut", "b.jpg")})
    (root / "a.jpg").write_bytes(jpeg(40, 40))
    (root / "c.jpg").write_bytes(jpeg(40, 40))
    scandir, access = os.scandir, os.access

    def refusing(folder: Path) -> object:
        if Path(folder).name == "shut":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", refusing)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "c.jpg" and access(path, mode))
    pictures = find_pictures([root])
    assert len(read_pictures(pictures)) == 1
    denied = "cannot be read (Permission denied)"
    assert pictures.unreadable == {str(root / "shut"): denied, str(root / "c.jpg"): denied}


def test_nothing_at_all_is_a_sentence(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", {("", "notes.txt"), ("", "more.txt"), ("sub", ".x")})
    with pytest.raises(UserError, match=r"called as pictures are \(3 other .* over \(2 .txt, 1 hidden.*\)\)"):
        read_pictures(find_pictures([root]))
    with pytest.raises(UserError, match=r"a.jpg does not exist: name pictures that can be read"):
        read_pictures(find_pictures(["a.jpg"]))
    with pytest.raises(UserError, match=r"c.jpg does not exist, and 2 more: name"):
        read_pictures(find_pictures([f"{name}.jpg" for name in "abcde"]))
    pictures = find_pictures([root / "sub"])
    assert passed_over(pictures) == "1 other file was passed over (1 hidden or of the system)"


def test_names_that_are_not_utf_8_stay_apart(tmp_path: Path) -> None:
    raw = [os.fsencode(tmp_path) + b"/" + name for name in (b"caf\xe9.jpg", b"caf\xea.jpg", "café.jpg".encode())]
    for path in raw:
        Path(os.fsdecode(path)).write_bytes(jpeg(40, 40))
    ids = read_pictures(find_pictures([tmp_path])).ids.tolist()
    assert len(set(ids)) == 3
    assert [name.encode().decode() for name in ids] == ids
    assert np.char.startswith(ids, str(tmp_path)).all()
