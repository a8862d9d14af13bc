"""Names to show for classes."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower.data.names import alike, composed, display_names, kaggle_names, places
from fastflower.errors import UserError


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_kaggles_names_are_104_different_ones_at_their_numbers() -> None:
    names = kaggle_names()
    assert len(set(names)) == len(names) == 104
    assert all(name == name.strip() != "" for name in names)
    # a few that the competition's own pages show
    expected = {0: "pink primrose", 11: "colt's foot", 48: "daisy", 53: "sunflower", 73: "rose", 103: "wild rose"}
    assert {number: names[number] for number in expected} == expected


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (numbers(104), kaggle_names()),
        (numbers(102), numbers(102)),
        (numbers(105), numbers(105)),
        (numbers(104)[::-1], kaggle_names()[::-1]),
        (sorted(numbers(104)), [kaggle_names()[int(number)] for number in sorted(numbers(104))]),  # as folders sort
        ([f"{k:03}" for k in range(104)], kaggle_names()),
        (numbers(105)[1:], numbers(105)[1:]),
        (["tulip", "rose"], ["tulip", "rose"]),
    ],
)
def test_own_names_are_shown_and_kaggles_for_exactly_its_numbers(classes: list[str], expected: list[str]) -> None:
    assert display_names(classes, None) == expected


def test_kaggles_names_can_be_asked_for() -> None:
    assert display_names(numbers(102), "kaggle104") == kaggle_names()[:102]
    assert display_names(["a", "b"], "kaggle104") == ["pink primrose", "hard-leaved pocket orchid"]
    assert display_names(["10", "2", "073"], "kaggle104") == [kaggle_names()[k] for k in (10, 2, 73)]
    for classes, words in [
        (numbers(105), "names 104 classes, and there are 105"),
        (["1", "104"], "names the classes 0 to 103, and there is a class 104"),
        (["-1", "1"], "there is a class -1"),
        (["1", "0.5"], "there is a class 0.5"),
        (["1", "rose"], "goes by number"),
        (["1", "01"], "goes by number"),
    ]:
        with pytest.raises(UserError, match=words):
            display_names(classes, "kaggle104")


@pytest.mark.parametrize(
    ("classes", "shown"),
    [
        (["10", "2", "30"], ["b", "a", "c"]),
        (["1", "10", "-2"], ["b", "c", "a"]),
        (["007", "08", "6"], ["b", "c", "a"]),
        (["b", "c", "a"], ["a", "b", "c"]),
        (["10", "2", "other"], ["a", "b", "c"]),
    ],
)
def test_names_of_a_file_are_in_the_order_of_numbers_where_the_classes_are_numbers(
    classes: list[str], shown: list[str], tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert display_names(classes, str(tmp_path / "names.txt")) == shown


@given(st.lists(st.integers(-50, 50), min_size=1, unique=True), st.lists(st.integers(0, 3), min_size=101), st.randoms())
def test_classes_are_the_same_by_name_or_by_number(numbers: list[int], zeros: list[int], random: Random) -> None:
    own = [str(number) for number in numbers]
    padded = [f"{'-' * (number < 0)}{'0' * zeros[number]}{abs(number)}" for number in numbers]
    wanted = random.sample(padded, len(padded))
    matches = places(wanted, own)
    assert matches
    assert [int(own[place]) for place in matches] == [int(name) for name in wanted]
    assert places(wanted, [*own, "rose"]) is None
    assert places([*wanted, "rose"], own) is None
    assert places([*wanted, "51"], [*own, "52"]) is None
    assert places(["7", "07"], ["07", "7"]) == [1, 0]
    assert places(["7", "07"], ["7", "007"]) is None


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
        ("a.json", b'{"0": "rose", "1": "iris", "2": 7}', "is not a JSON list"),
        ("a.json", b'{"0": "rose", "1": "iris", "3": "tulip"}', "has no name for class 2"),
        ("a.json", b'{"0": "rose", "1": "iris", "1": "tulip"}', "has the class name '1' twice"),
        ("a.json", b'{"rose": 0, "iris": 1, "tulip": 1}', "has the class name '1' twice"),
        ("a.json", '["é", "e\u0301", "tulip"]'.encode(), "has the class name 'é' twice"),
        ("a.json", b"{}", "is not a JSON list"),
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


def test_an_object_names_classes_by_what_they_are_called(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    for text in ({"21": "fire lily", "3": "rose", "1": "iris"}, {"fire lily": 21, "rose": 3, "iris": 1}):
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(text).encode())
        assert display_names(["1", "3", "21"], str(path)) == ["iris", "rose", "fire lily"]
        assert display_names(["021", "1"], str(path)) == ["fire lily", "iris"]
        with pytest.raises(UserError, match="has no name for class 2: write one"):
            display_names(["1", "2"], str(path))
    path.write_text(json.dumps({"1": "iris", "0": "rose"}))
    assert display_names(["a", "b"], str(path)) == ["rose", "iris"]
    with pytest.raises(UserError, match="has no name for class 2: write one"):  # 1, 2 are not 0, 1
        display_names(["1", "2"], str(path))
    path.write_text(json.dumps({"ro\u0301sa": "Rose", "b": "Bush"}))
    assert display_names(["b", "r\u00f3sa"], str(path)) == ["Bush", "Rose"]


@given(st.lists(st.text("ab\u0301\u00e1\u00e4e\u0308\u1100\u1161 -", min_size=1), min_size=1), st.randoms())
def test_classes_are_the_same_in_each_unicode_form(names: list[str], random: Random) -> None:
    own = [*dict.fromkeys(unicodedata.normalize("NFC", name) for name in names)]
    wanted = [unicodedata.normalize(random.choice(["NFC", "NFD"]), name) for name in random.sample(own, len(own))]
    matches = places(wanted, own)
    assert matches is not None
    assert [own[place] for place in matches] == [unicodedata.normalize("NFC", name) for name in wanted]
    assert places(own, [unicodedata.normalize("NFD", name) for name in own]) == [*range(len(own))]
    assert all(composed(name) == unicodedata.normalize("NFC", name) for name in names)
    assert len({name for group in alike(own) for name in group}) <= len(own)
