"""A trained network and pictures of any origin: by the command and from Python, the same pixels and figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from nvidia.dali.pipeline import DataNode
from PIL import Image

import fastflower
from fastflower.arrays import Bytes
from fastflower.data.decoding import decoded_pictures
from fastflower.data.view import Engine
from fastflower.evaluation import classifier
from fastflower.evaluation.pictures import find_pictures, read_pictures
from fastflower.evaluation.predictions import read_predictions
from tests.conftest import READABLE, copy_run, jpeg, shared_run, write_folders
from tests.conftest import fastflower as command
from tests.evaluation.test_pictures import undecodable
from tests.processes import in_ranks
from tests.training import tiny_worker

CLASSES = ['rose, "wild"', "id", "tulip"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on folders whose names are awkward."""
    folder = tmp_path_factory.mktemp("classifier")
    write_folders(folder / "data", dict.fromkeys(CLASSES, 12))
    with shared_run(folder, "--train.epochs", 1) as run:
        yield run


@pytest.fixture
def run(shared: Path, tmp_path: Path, tiny_net: None) -> Path:
    return copy_run(shared, tmp_path / "run")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures of drawn sizes, and what lies among such."""
    root, rng = tmp_path / "photos", np.random.default_rng(3)
    for i, name in enumerate(["a.jpg", "b.JPG", "c, d.jpg", "two/a.jpg", "two/e\nf.jpg", "two/deep/-g.jpg", "z.jpeg"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(int(rng.integers(33, 120)), int(rng.integers(33, 120)), i))
    for name in ("notes.txt", ".DS_Store", "two/Thumbs.db"):
        (root / name).write_text("none")
    return root


@pytest.fixture
def bad(photos: Path) -> list[str]:
    """What cannot be read, among the pictures."""
    contents = {"cut.jpg": jpeg(90, 90)[:300], "page.jpg": b"<html>", "two/none.png": undecodable(), "two/0.png": b""}
    for name, data in contents.items():
        (photos / name).write_bytes(data)
    (photos / "gone.jpg").symlink_to("nowhere")
    return [str(photos / name) for name in (*contents, "gone.jpg")]


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def pixels_of(paths: list[Path]) -> list[Bytes]:
    """What the decoder makes of files, uint8 RGB [H, W, 3]."""
    records = read_pictures(find_pictures(paths))

    def whole(pictures: DataNode) -> DataNode:
        return pictures

    decoded = decoded_pictures(records, np.arange(len(records)), Engine(), whole)
    return [np.array(pixels) for _, pixels in decoded]


def test_a_folder_is_named_picture_by_picture(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/names.csv"
    result = command("predict", run, photos, "--out", out)
    assert result.code == 0, result.err
    header, *rows = rows_of(out)
    assert header == ["file", "name", "probability", "name_2", "probability_2", "name_3", "probability_3"]
    paths = find_pictures([photos]).paths
    assert [row[0] for row in rows] == [str(path) for path in paths]
    assert len(rows) == 7
    assert all(set(row[1::2]) == set(CLASSES) for row in rows)
    probabilities = np.array([row[2::2] for row in rows], np.float32)
    assert (np.diff(probabilities, axis=1) <= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    lines = result.out.splitlines()
    assert len(lines) == 2 + 7
    assert lines[2].startswith(str(paths[0]))
    assert f"{rows[0][1]}" in lines[2]
    assert "3 other files were passed over" in result.err
    assert not list(run.glob("predictions*"))
    # the same by other words, forms and numbers of classes
    result = command("predict", run, f"{photos}/**", *paths, "--json", "--top", 2)
    assert result.code == 0, result.err
    listed = json.loads(result.out)
    assert sorted(row["file"] for row in listed) == sorted(str(path) for path in paths)
    assert all(len(row["best"]) == 2 for row in listed)
    parquet = tmp_path / "names.parquet"
    assert command("predict", run, photos, "--out", parquet).code == 0
    frame = pd.read_parquet(parquet)
    assert list(frame.columns[5:]) == ["p:id", 'rose, "wild"', "tulip"]
    np.testing.assert_array_equal(np.sort(frame.iloc[:, 5:].to_numpy(), axis=1)[:, ::-1], probabilities)
    source = read_predictions(parquet).source
    assert (source["records"]["count"], source["views"], source["data"]) == (7, {"crops": 1, "scales": []}, None)


def test_what_cannot_be_read_is_listed_at_the_end(run: Path, photos: Path, bad: list[str], tmp_path: Path) -> None:
    out = tmp_path / "names.csv"
    result = command("predict", run, photos, photos / "notes.txt", "nowhere*.jpg", "--out", out)
    assert result.code == 1
    rows = rows_of(out)[1:]
    assert len(rows) == 7
    _, listed = result.err.split("7 cannot be read as pictures:\n")
    names = [line.strip().rpartition(": ")[0] for line in listed.splitlines()]
    assert names == sorted([*bad, str(photos / "notes.txt"), "nowhere*.jpg"])
    assert "two/none.png: cannot be decoded" in result.err
    assert not set(bad) & {row[0] for row in rows}
    # the others' figures are those that they have by themselves
    good = [row[0] for row in rows]
    alone = command("predict", run, *good, "--out", tmp_path / "good.csv")
    assert alone.code == 0, alone.err
    assert (tmp_path / "good.csv").read_bytes() == out.read_bytes()


def test_nothing_that_can_be_read_is_one_sentence(run: Path, photos: Path, bad: list[str], tmp_path: Path) -> None:
    out = tmp_path / "names.csv"
    for given in ([bad[0]], bad, [bad[3]], [photos / "notes.txt"]):
        refused = command("predict", run, *given, "--out", out)
        assert refused.code == 2
        assert (refused.out, len(refused.err.splitlines())) == ("", 1)
        assert "name pictures that can be read" in refused.err
        assert not out.exists()


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_parts_and_bad_pictures_among_them_change_nothing(
    run: Path, photos: Path, bad: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    assert command("predict", run, photos, "--out", whole, "--batch_size", 1).code == 1
    monkeypatch.setattr("fastflower.evaluation.classifier.AT_ONCE", at_once)
    assert command("predict", run, photos, "--out", parts, "--batch_size", 1).code == 1
    for a, b in ((read_predictions(whole), read_predictions(parts)),):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_array_equal(a.probabilities, b.probabilities)
        assert a.source == b.source


def test_two_processes_write_one_file(run: Path, photos: Path, bad: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert command("predict", run, photos, "--out", one, "--top", 1).code == 1
    done = in_ranks(tiny_worker.main, "predict", run, photos, "--out", two, "--top", 1)
    assert done.code == 1, done.err
    assert [row[:2] for row in rows_of(two)] == [row[:2] for row in rows_of(one)]
    figures, others = ([float(row[2]) for row in rows_of(path)[1:]] for path in (one, two))
    np.testing.assert_allclose(figures, others, atol=1e-6)
    assert done.err.count("two/none.png: cannot be decoded") == 1
    assert done.out.count("c, d.jpg") == 1


def test_what_is_wrong_is_said_before_anything_is_computed(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.evaluation.score.Scoring.scores", lambda *_: pytest.fail("a picture is scored"))
    (tmp_path / "file").write_text("")
    options = [
        (("--out", tmp_path / "x.txt"), "x.txt is none of .csv, .json, .parquet"),
        (("--out", tmp_path), "is a folder: name a file"),
        (("--out", tmp_path / "file/x.csv"), "file"),
        (("--top", 0), "top is 0: give at least 1"),
        (("--names", tmp_path / "file"), "class names for 3 classes"),
        (("--scales", 8), "--scales 8 is smaller than data.crop"),
    ]
    for given, words in options:
        refused = command("predict", run, photos, *given)
        assert refused.code == 2
        assert words in refused.err
    of_split = (("--split", "val"), ("--submission", "s.csv"), ("--sample", "s.csv"), ("--sizes", 8))
    for option, value in of_split:
        refused = command("predict", run, photos, option, value)
        assert refused.code == 2
        assert "are about a split: drop them, or the pictures" in refused.err
    for out in ("x.txt", "x"):
        refused = command("predict", run, "--split", "train", "--out", tmp_path / out)
        assert refused.code == 2
        assert "none of .csv, .json, .parquet" in refused.err


def test_a_split_is_written_by_extension_too(run: Path, tmp_path: Path) -> None:
    for form in ("csv", "json", "parquet"):
        assert command("predict", run, "--split", "train", "--out", tmp_path / f"p.{form}", "--top", 1).code == 0
    predictions = read_predictions(tmp_path / "p.parquet")
    header, *rows = rows_of(tmp_path / "p.csv")
    assert header == ["id", "name", "probability"]
    assert [row[0] for row in rows] == predictions.ids.tolist()
    assert [row[1] for row in rows] == predictions.names
    assert [np.float32(row[2]) for row in rows] == predictions.confidence.tolist()
    assert [row["id"] for row in json.loads((tmp_path / "p.json").read_text())] == predictions.ids.tolist()
    result = command("predict", run, "--split", "train", "--json")
    assert [row["id"] for row in json.loads(result.out)] == predictions.ids.tolist()
    assert len(command("predict", run, "--split", "train").out.splitlines()) == 2 + 20
    assert "… and" in command("predict", run, "--split", "train").err


@pytest.mark.parametrize("views", [{}, {"crops": 10}, {"scales": (32, 48)}])
def test_python_and_the_command_say_the_same(run: Path, photos: Path, tmp_path: Path, views: dict[str, Any]) -> None:
    out = tmp_path / "names.parquet"
    options = [word for name, value in views.items() for word in (f"--{name}", str(value).strip("()").replace(" ", ""))]
    assert command("predict", run, photos, "--out", out, *options).code == 0
    written = read_predictions(out)
    network = fastflower.load(run, **views)
    paths = find_pictures([photos]).paths
    for pictures in (photos, str(photos), paths, iter(paths)):
        predictions = network.predict(pictures)
        assert predictions.ids.tolist() == [str(path) for path in paths]
        assert predictions.classes == network.classes == ["id", 'rose, "wild"', "tulip"]
        order = np.argsort(predictions.ids, kind="stable")
        np.testing.assert_array_equal(predictions.probabilities[order], written.probabilities)
    function = fastflower.predict(run, photos, out=tmp_path / "again.csv", **views)
    np.testing.assert_array_equal(function.probabilities, predictions.probabilities)
    # pixels: the decoder's own are the same picture to the bit, in whatever form they come
    pixels = pixels_of(paths)
    for given in (pixels, [Image.fromarray(picture) for picture in pixels], [p[::-1][::-1] for p in pixels]):
        from_memory = network.predict(given)
        assert from_memory.ids.tolist() == [str(i) for i in range(7)]
        np.testing.assert_array_equal(from_memory.probabilities, predictions.probabilities)
    one = network.predict(pixels[4])
    np.testing.assert_allclose(one.probabilities, predictions.probabilities[4:5], atol=1e-6)
    assert one.names == predictions.names[4:5]
    stacked = network.predict(np.stack([pixels[0], pixels[0][:, ::-1]]))
    assert stacked.probabilities.shape == (2, 3)


def test_pixels_come_in_portions(run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = fastflower.load(run, batch_size=1)
    pixels = pixels_of(find_pictures([photos]).paths)
    whole = network.predict(pixels)
    monkeypatch.setattr("fastflower.evaluation.classifier.PIXELS_AT_ONCE", 20_000)
    np.testing.assert_array_equal(network.predict(pixels).probabilities, whole.probabilities)
    assert network.predict(pixels).ids.tolist() == whole.ids.tolist()
    sizes = [sum(picture.nbytes for picture in portion) for portion in classifier._portions(pixels)]
    assert len(sizes) > 2
    assert sum(sizes) == sum(picture.nbytes for picture in pixels)


def test_pictures_of_pil_are_upright_and_rgb(run: Path, odd_images: Path) -> None:
    network = fastflower.load(run)
    names = [odd_images / name for name in READABLE if "cmyk" not in name]  # of inks PIL makes other colors
    files = network.predict(names)
    opened = network.predict([Image.open(path) for path in names])
    np.testing.assert_allclose(opened.probabilities, files.probabilities, atol=0.05)


def test_deep_gray_of_pil_is_what_the_file_is(run: Path, tmp_path: Path) -> None:
    """PIL's own conversion to RGB would cut all levels above 255 off."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (40, 40), np.uint16)).save(path)
    network = fastflower.load(run)
    opened = network.predict(Image.open(path)).probabilities
    np.testing.assert_allclose(opened, network.predict(path).probabilities, atol=1e-3)


def test_decoders_are_quiet_in_python_too(run: Path, bad: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    network = fastflower.load(run)
    with pytest.warns(UserWarning, match="cannot be read as pictures") as caught:
        network.predict(Path(bad[0]).parent)
    assert caught[0].filename == __file__
    assert "parser" not in capfd.readouterr().err


def test_the_network_is_ready_for_a_loop_of_ones_own(run: Path) -> None:
    network = fastflower.load(run / "checkpoints/best.pt")
    assert not network.network.training
    assert next(network.network.parameters()).device.type == "cpu"
    with torch.no_grad():
        assert network.network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert "best.pt" in repr(network)
    assert "3 classes" in repr(network)


def test_what_is_left_out_is_in_the_result(run: Path, photos: Path, bad: list[str]) -> None:
    network = fastflower.load(run)
    for predict in (network.predict, lambda pictures: fastflower.predict(run, pictures)):
        with pytest.warns(UserWarning, match="5 cannot be read as pictures: .*none.png: cannot be decoded") as caught:
            predictions = predict(photos)
        assert caught[0].filename == __file__
        assert set(predictions.unreadable) == set(bad)
        assert len(predictions) == len(predictions.names) == 7
        assert "Predictions of 7 pictures, 3 classes" in repr(predictions)


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([], "pictures has no pictures"),
        (iter(()), "pictures has no pictures"),
        (7, "int is no picture"),
        ([None], "NoneType is no picture"),
        (["a.jpg", np.zeros((4, 4, 3), np.uint8)], "pictures has both paths and pixels"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\] is no picture: give uint8 RGB"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\] is no picture"),
        (Image.new("F", (4, 4)), "mode F has no colors"),
        ([np.zeros((4, 4), np.uint8)], r"uint8 \[4, 4\] is no picture"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\] is no picture"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\] is no picture"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\] is no picture"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "Tensor is no picture"),
        ("none.jpg", "none.jpg does not exist"),
        (["none.jpg", ""], "a path is empty"),
    ],
)
def test_what_is_no_picture_is_a_sentence(run: Path, pictures: Any, words: str) -> None:
    with pytest.raises(fastflower.UserError, match=words):
        fastflower.load(run).predict(pictures)
