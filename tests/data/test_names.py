"""Names to show for classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastflower.data.names import display_names, kaggle_names
from fastflower.errors import UserError


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_kaggles_names_are_104_different_ones_at_their_numbers() -> None:
    names = kaggle_names()
    assert len(set(names)) == len(names) == 104
    assert all(name == name.strip() != "" for name in names)
    # a few that the competition's own pages show
    known = {0: "pink primrose", 11: "colt's foot", 48: "daisy", 53: "sunflower", 73: "rose", 103: "wild rose"}
    assert {number: names[number] for number in known} == known


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (numbers(104), kaggle_names()),
        (numbers(102), numbers(102)),
        (numbers(105), numbers(105)),
        (numbers(104)[::-1], numbers(104)[::-1]),
        (["tulip", "rose"], ["tulip", "rose"]),
    ],
)
def test_own_names_are_shown_and_kaggles_for_exactly_its_numbers(classes: list[str], expected: list[str]) -> None:
    assert display_names(classes, None) == expected


def test_kaggles_names_can_be_asked_for() -> None:
    assert display_names(numbers(102), "kaggle104") == kaggle_names()[:102]
    assert display_names(["a", "b"], "kaggle104") == ["pink primrose", "hard-leaved pocket orchid"]
    with pytest.raises(UserError, match="names 104 classes, and there are 105"):
        display_names(numbers(105), "kaggle104")


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("names.json", json.dumps(["Gänseblümchen", 'rose, "red"', "バラ"]).encode()),
        ("names.txt", 'Gänseblümchen\nrose, "red"\nバラ\n'.encode()),
        ("names", '\ufeffGänseblümchen\r\n  rose, "red"\r\nバラ'.encode()),  # as an editor of another system leaves it
    ],
)
def test_names_come_from_a_file(tmp_path: Path, file: str, data: bytes) -> None:
    path = tmp_path / file
    path.write_bytes(data)
    assert display_names(numbers(3), str(path)) == ["Gänseblümchen", 'rose, "red"', "バラ"]


@pytest.mark.parametrize(
    ("file", "data", "sentence"),
    [
        ("a.txt", b"rose\ntulip\n", "has 2 class names for 3 classes"),
        ("a.txt", b"rose\ntulip\niris\nlily\n", "has 4 class names for 3 classes"),
        ("a.txt", b"rose\n\niris\n", "has no name for class 1"),
        ("a.txt", b"rose\niris\nrose\n", "has the class name 'rose' twice"),
        ("a.txt", "rose\nGänse\niris\n".encode("latin-1"), "cannot be read as class names"),
        ("a.json", b'["rose", "iris", ""]', "has no name for class 2"),
        ("a.json", b'["rose", "iris", 3]', "is not a JSON list"),
        ("a.json", b'{"0": "rose", "1": "iris", "2": "tulip"}', "is not a JSON list"),
        ("a.json", b'["rose", "iris"', "cannot be read as class names"),
    ],
)
def test_a_file_without_a_name_of_its_own_for_each_class_is_refused(
    tmp_path: Path, file: str, data: bytes, sentence: str
) -> None:
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence) as refused:
        display_names(numbers(3), str(path))
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.txt cannot be read \(No such file"):
        display_names(numbers(3), str(tmp_path / "missing.txt"))
