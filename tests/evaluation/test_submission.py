"""The submission: what a label means is what the class is called, or its place where classes have no numbers."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.combine import Member, Method, combine
from fastflower.evaluation.predict import hand_in
from fastflower.evaluation.predictions import Predictions, read_predictions, sort_by_id, write_predictions
from fastflower.evaluation.submission import Form, form_of, meaning, write_submission
from tests.conftest import fastflower, train_arguments, write_dataset, write_folders


def rows(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *pairs = csv.reader(file)
    assert header == ["id", "label"]
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def made(classes: list[str], seed: int, n: int = 12) -> Predictions:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(len(classes)), n).astype(np.float32)
    ids = np.array([f"{i:03}" for i in range(n)])
    return sort_by_id(Predictions("test", classes, ids, probabilities, np.full(n, NO_LABEL), {"seed": seed}))


NUMBERS = st.one_of(
    st.integers(-20, 2000).map(str),
    st.tuples(st.integers(0, 99), st.integers(1, 4)).map(lambda pair: str(pair[0]).zfill(pair[1])),
    st.sampled_from(["0.5", "1.0", "-3", "+4", "1.25"]),
)
NAMES = st.text("abcdefghij ,\"'öß花-_.", min_size=1, max_size=8)
CLASSES = st.one_of(
    st.lists(NUMBERS, min_size=2, max_size=12, unique=True),
    st.lists(NAMES, min_size=2, max_size=12, unique=True),
    st.lists(NUMBERS | NAMES, min_size=2, max_size=12, unique=True),
    st.integers(2, 30).map(lambda count: [str(k) for k in range(count)]),
).flatmap(st.permutations)


def is_numeric(name: str) -> bool:
    """Whether a reader of the file would take it for a number."""
    return re.fullmatch(r"[+-]?[0-9]+([.][0-9]+)?", name) is not None


@settings(max_examples=80, deadline=None)
@given(classes=CLASSES, seed=st.integers(0, 2**32 - 1))
def test_a_label_is_the_class_that_is_called_so(
    classes: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("submission")
    wanted = made(classes, seed)
    write_predictions(folder / "p.parquet", wanted)
    notes = hand_in(read_predictions(folder / "p.parquet"), submission=folder / "s.csv")
    likeliest = [classes[row.argmax()] for row in wanted.probabilities]
    labels = rows(folder / "s.csv")
    assert list(labels) == wanted.ids.tolist()
    if any(map(is_numeric, classes)):
        assert list(labels.values()) == likeliest
        assert len(notes) == 1
    else:
        assert [classes[int(label)] for label in labels.values()] == likeliest
        assert f"0 = {classes[0]}, 1 = {classes[1]}" in notes[1]


@settings(max_examples=60, deadline=None)
@given(classes=CLASSES, seed=st.integers(0, 2**32 - 1), method=st.sampled_from(["vote", "mean"]))
def test_members_whose_classes_are_in_other_orders_hand_in_the_same(
    classes: list[str], seed: int, method: Method
) -> None:
    rng = np.random.default_rng(seed)
    members = [made(classes, seed + k) for k in range(3)]
    shuffled = []
    for member in members:
        order = rng.permutation(len(classes))
        names, columns = [classes[k] for k in order], member.probabilities[:, order]
        shuffled.append(replace(member, classes=names, probabilities=columns))
    answers = []
    for group in (members, shuffled, shuffled[::-1]):
        combined = combine([Member(str(member.source["seed"]), member) for member in group], method)
        answers.append([combined.classes[k] for k in combined.likeliest])
    assert answers[0] == answers[1] == answers[2]


def sample(path: Path, labels: Sequence[object]) -> Path:
    path.write_text("id,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    return path


FOLDERS, FLOWERS = ["10", "2", "30"], ["daisy", "rose", "tulip"]


@pytest.mark.parametrize(
    ("classes", "labels", "written"),
    [
        (FOLDERS, [0, 0, 0], FOLDERS),  # a placeholder
        (FOLDERS, ["", "", ""], FOLDERS),
        (FOLDERS, [10, 2, 10], FOLDERS),
        (FOLDERS, [10, 10, 10], FOLDERS),
        (FLOWERS, [0, 0, 0], ["0", "1", "2"]),
        (FLOWERS, [0, 2, 1], ["0", "1", "2"]),
        (FLOWERS, ["rose", "rose", "daisy"], FLOWERS),
        (FLOWERS, ["tulip", "tulip", "tulip"], FLOWERS),
        (["0", "1", "2"], [0, 1, 2], ["0", "1", "2"]),
        (["2", "other", "10"], [0, 0, 0], ["2", "other", "10"]),
        (["2", "other", "10"], ["other", 2, 2], ["2", "other", "10"]),
    ],
)
def test_a_sample_decides_between_names_and_places(
    classes: list[str], labels: list[object], written: list[str], tmp_path: Path
) -> None:
    assert form_of(classes, ["0", "1", "2"], sample(tmp_path / "s.csv", labels)).labels == written


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        (FOLDERS, [0, 1, 2], r"has the label '0' \(id 0\), and the classes are 10, 2, 30:"),
        (FOLDERS, [10, 2, 3], r"has the label '3' \(id 2\)"),
        (FOLDERS, ["02", 10, 2], r"has the label '02' \(id 0\)"),
        (FLOWERS, [0, 1, 3], r"has the label '3' \(id 2\), and the classes are 0, 1, 2 \(daisy, rose, tulip\)"),
        (FLOWERS, [1, 2, -1], r"has the label '-1' \(id 2\)"),
        (FLOWERS, ["rose", "iris", "rose"], r"has the label 'iris' \(id 1\)"),
        (FLOWERS, ["0", "rose", "1"], r"has the label 'rose' \(id 1\)"),
        (FLOWERS, [0.5, 0.5, 0.5], r"has the label '0.5'"),
    ],
)
def test_a_sample_of_other_classes_is_refused(
    classes: list[str], labels: list[object], words: str, tmp_path: Path
) -> None:
    path = sample(tmp_path / "s.csv", labels)
    with pytest.raises(UserError, match=words) as error:
        form_of(classes, ["0", "1", "2"], path)
    assert str(path) in str(error.value)


def answered(answers: dict[str, int], classes: list[str]) -> Predictions:
    """Predictions whose likeliest class, by its place, is given for each id."""
    rows = np.eye(len(classes), dtype=np.float32)[list(answers.values())]
    return Predictions("test", classes, np.array(list(answers)), rows, np.full(len(rows), NO_LABEL))


def test_a_submission_has_exact_ids_and_labels_sorted_and_the_header(tmp_path: Path) -> None:
    path, classes = tmp_path / "submission.csv", ["1", "103", "rose, red", "007"]
    predictions = answered({"b": 0, "000123": 1, "a,b": 2, 'q"\n': 3}, classes)
    write_submission(path, form_of(classes, predictions.ids.tolist()), predictions)
    assert path.read_bytes().startswith(b"id,label\n000123,103\n")
    assert rows(path) == dict(zip(predictions.ids.tolist(), classes, strict=True))
    assert list(rows(path)) == sorted(rows(path))


@pytest.mark.parametrize("wanted", [["a"], ["a", "b", "c"], ["a", "x"]])
def test_a_submission_with_other_ids_than_the_records_is_not_written(wanted: list[str], tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("earlier")
    predictions = answered({"a": 0, "b": 1}, FLOWERS)
    with pytest.raises(UserError, match="was not written"):
        write_submission(path, form_of(FLOWERS, wanted), predictions)
    nan = replace(predictions, probabilities=np.full((2, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="ids a, b would have no answer"):
        write_submission(path, Form(["0", "1", "2"], {"a": "a", "b": "b"}, [0, 1, 2], ["id", *FLOWERS]), nan)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_sample_must_have_the_records_ids(tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    path.write_bytes("\ufeffid,label\r\n01,0\r\n2,0\r\n".encode())
    form_of(FLOWERS, ["2", "01"], path)
    with pytest.raises(UserError, match="the records lack id 01, and it lacks ids 1, 3"):
        form_of(FLOWERS, ["1", "2", "3"], path)
    names = [f"{i:02}" for i in range(9)]
    with pytest.raises(UserError, match="it lacks ids 00, 02, 03, 04, 05 and 3 more"):
        form_of(FLOWERS, [*names, "2"], path)
    for text, words in [
        ("", "is empty"),
        ("a,0\nb,0\n", "has no header, but begins with id a"),
        ("id,label\na,0\nb\n", "has 1 fields in the line of 'b', and 2 in its header"),
        ("id,label\na,0\na,1\n", "has id a more than once"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            form_of(FLOWERS, ["a"], path)
    with pytest.raises(UserError, match="cannot be read"):
        form_of(FLOWERS, ["a"], tmp_path / "none.csv")


FIELD = st.text("abcXYZ01 ,;\"'öß花-_.", min_size=1, max_size=6).filter(lambda text: text.strip() == text)


@settings(max_examples=120, deadline=None)
@given(
    classes=st.lists(NAMES.filter(lambda name: name.strip() == name), min_size=2, max_size=6, unique_by=str.casefold),
    stems=st.lists(st.text("abc012", min_size=1, max_size=4), min_size=2, max_size=12, unique=True),
    header=st.tuples(FIELD, FIELD).filter(lambda pair: pair[0] != pair[1]),
    shape=st.sampled_from(["places", "names", "probabilities"]),
    suffix=st.sampled_from(["", ".jpg", ".PNG"]),
    separator=st.sampled_from([",", ";", "\t"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    quoted=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_handed_in_has_the_samples_form_as_pandas_reads_it(
    classes: list[str],
    stems: list[str],
    header: tuple[str, str],
    shape: str,
    suffix: str,
    separator: str,
    line_end: str,
    mark: bool,
    quoted: bool,
    reverse: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    others = set(",;\t") - {separator}
    assume(header[1].strip().casefold() not in [name.casefold() for name in classes])  # whose probability it would be
    assume(header[0] not in stems and not any(is_numeric(name) for name in classes))
    assume(not any(others & set(text) for text in (*header, *classes)))
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("sample")
    predictions = replace(made(classes, seed, len(stems)), ids=np.array(sorted(stems)))
    order = rng.permutation(len(stems))
    if shape == "probabilities":
        columns = [classes[k] for k in rng.permutation(len(classes))]
        cells = {name: ["0.5"] * len(stems) for name in columns}
    else:
        given_labels = ["0"] * len(stems) if shape == "places" else list(rng.choice(classes, len(stems)))
        cells = {header[1]: given_labels}
    assume(header[0] not in cells)
    table = {header[0]: [stems[k] + suffix for k in order]} | cells
    frame = pandas.DataFrame(dict(reversed(table.items())) if reverse and len(table) == 2 else table)
    frame.to_csv(
        folder / "sample.csv",
        sep=separator,
        index=False,
        lineterminator=line_end,
        encoding="utf-8-sig" if mark else "utf-8",
        quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL,
    )
    hand_in(predictions, submission=folder / "s.csv", sample=folder / "sample.csv")
    content = (folder / "s.csv").read_bytes()
    assert content.startswith(codecs.BOM_UTF8) == mark
    assert (b"\r\n" in content) == (line_end == "\r\n")
    assert content.removeprefix(codecs.BOM_UTF8).startswith(b'"') or not quoted
    kinds: Any = {"sep": separator, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    read = pandas.read_csv(folder / "s.csv", **kinds)
    assert list(read.columns) == list(pandas.read_csv(folder / "sample.csv", **kinds).columns)
    assert read[header[0]].tolist() == [stems[k] + suffix for k in order]
    row_of = {name: row for row, name in enumerate(predictions.ids.tolist())}
    probabilities = predictions.probabilities[[row_of[stems[k]] for k in order]]
    if shape == "probabilities":
        wanted = probabilities[:, [classes.index(name) for name in columns]]
        np.testing.assert_array_equal(read[columns].to_numpy().astype(np.float32), wanted)
    else:
        places = probabilities.argmax(axis=1)
        assert read[header[1]].tolist() == [str(k) if shape == "places" else classes[k] for k in places]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "id,daisy,rose\n0,0,0\n1,0,0\n2,0,0\n",
            "2 columns beside its ids, and they are not the 3 classes: ",
        ),
        ("id,daisy,rose,iris\n0,0,0,0\n1,0,0,0\n2,0,0,0\n", "iris are no classes, and it lacks tulip"),
        ("id,label,Usage\n0,0,a\n1,0,a\n2,0,a\n", "label, Usage are no classes"),
        ("id,daisy,rose,tulip\n0,0,0,\n1,0,x,0\n2,0,0,0\n", "has 'x' in the column rose, where a probability"),
        ("id;daisy;rose;tulip\n0;0,5;0;0\n1;0;0;0\n2;0;0;0\n", "has '0,5' in the column daisy"),
        ("id,label\n0.jpg,0\n1.jpg,0\n", "it lacks"),
        ("id,label\n0.jpg,0\n1.jpg,0\n3.jpg,0\n", "the records lack"),
    ],
)
def test_a_sample_of_another_form_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        form_of(FLOWERS, ["0", "1", "2"], tmp_path / "sample.csv")


@pytest.mark.parametrize("headers", [["Rose", "DAISY", "tulip"], ["1", "0", "2"]])
def test_columns_are_classes_by_name_in_any_capitals_or_by_number(headers: list[str], tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text(f"id,{','.join(headers)}\n0,0,0,0\n1,0,0,0\n2,0,0,0\n")
    form = form_of(FLOWERS, ["0", "1", "2"], tmp_path / "sample.csv")
    assert (form.columns, form.header) == ([1, 0, 2], ["id", *headers])


@pytest.mark.parametrize("cell", ["0", "0.5", ""])
def test_a_column_that_one_class_names_is_for_its_probability(cell: str, tmp_path: Path) -> None:
    """A label there, 0 of the first class, would be read as the probability 0 of the very same class."""
    sample, predictions = tmp_path / "sample.csv", made(["dog", "cat"], seed=1)
    sample.write_text("id,Dog\n" + "".join(f"{name},{cell}\n" for name in predictions.ids))
    hand_in(predictions, submission=tmp_path / "s.csv", sample=sample)
    read = pandas.read_csv(tmp_path / "s.csv", dtype={"id": str})
    assert list(read.columns) == ["id", "Dog"]
    np.testing.assert_array_equal(read["Dog"].astype(np.float32), predictions.probabilities[:, 0])


def test_only_places_are_explained() -> None:
    assert meaning(FOLDERS, FOLDERS) is None
    assert meaning(FLOWERS, FLOWERS) is None
    many = [f"kind {k}" for k in range(7)]
    sentence = (
        "Its labels are the numbers of the classes: 0 = kind 0, 1 = kind 1, 2 = kind 2, 3 = kind 3, 4 = kind 4, … 6"
    )
    assert meaning(many, [str(k) for k in range(7)]) == f"{sentence} = kind 6."


def test_numbered_folders_are_handed_in_and_combined_by_their_numbers(tmp_path: Path, tiny_net: None) -> None:
    names = ("2", "10", "0", "1")  # sorted as text: 0, 1, 10, 2
    folders = {f"train/{name}": 6 for name in names} | {f"val/{name}": 3 for name in names} | {"test": 5}
    root, run = write_folders(tmp_path / "folders", folders), tmp_path / "run"
    assert fastflower(*train_arguments(root, run), "--train.epochs", 2).code == 0
    result = fastflower("predict", run, "--split", "val", "--submission", tmp_path / "s.csv")
    assert result.code == 0, result.err
    predictions = read_predictions(run / "predictions-val.parquet")
    assert predictions.classes == ["0", "1", "10", "2"]
    assert [predictions.classes[k] for k in predictions.labels] == [name.partition("/")[0] for name in predictions.ids]
    wanted = {
        name: predictions.classes[row.argmax()]
        for name, row in zip(predictions.ids, predictions.probabilities, strict=True)
    }
    assert rows(tmp_path / "s.csv") == wanted
    # a run on TFRecords of the numbers 0 to 10 takes the folders by their names, and the run on folders the TFRecords
    records = write_dataset(tmp_path / "records", {"train": 33, "val": 11, "test": 3}, classes=11)
    assert fastflower(*train_arguments(records, tmp_path / "numbers"), "--train.epochs", 1).code == 0
    out = tmp_path / "p.parquet"
    assert fastflower("predict", tmp_path / "numbers", "--split", "val", "--data.root", root, "--out", out).code == 0
    predictions = read_predictions(out)
    assert [predictions.classes[k] for k in predictions.labels] == [name.partition("/")[0] for name in predictions.ids]
    refused = fastflower("eval", run, "--data.root", records)
    assert refused.code == 2
    assert "has pictures of class '3' in val" in refused.err
    few = write_dataset(tmp_path / "few", {"val": 2}, classes=2)
    assert fastflower("eval", run, "--data.root", few).code == 0
    refused = fastflower("ensemble", run, tmp_path / "numbers", "--split", "val", "--data.root", root)
    assert refused.code == 2
    assert f"{run} has 4 classes and {tmp_path / 'numbers'} 11" in refused.err


def test_runs_on_records_and_on_folders_of_the_same_numbers_are_combined(tmp_path: Path, tiny_net: None) -> None:
    folders = {f"{split}/{number}": 2 for number in range(11) for split in ("train", "val")} | {"test": 4}
    data = [
        write_folders(tmp_path / "folders", folders),
        write_dataset(tmp_path / "records", {"train": 33, "val": 11, "test": 4}, classes=11),
    ]
    runs = [tmp_path / "a", tmp_path / "b"]
    for root, run in zip(data, runs, strict=True):
        assert fastflower(*train_arguments(root, run), "--train.epochs", 1).code == 0
    ids = []
    for order in (runs, runs[::-1]):
        result = fastflower("ensemble", *order, "--data.root", data[0], "--submission", tmp_path / "s.csv")
        assert result.code == 0, result.err
        ids.append(rows(tmp_path / "s.csv"))
    assert ids[0] == ids[1]
    parts = [read_predictions(run / "predictions-test.parquet") for run in runs]
    mean = {
        name: np.mean([part.probabilities[:, part.classes.index(name)].astype(float) for part in parts], axis=0)
        for name in parts[0].classes
    }
    said = [[part.classes[k] for k in part.likeliest] for part in parts]
    for i, label in enumerate(ids[0].values()):
        assert label == max((names[i] for names in said), key=lambda name: mean[name][i])
