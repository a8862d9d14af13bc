"""YAML files: what plain words mean, which files are refused in a sentence, and that no file ends in a traceback."""

from __future__ import annotations

import codecs
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.settings import build, load_yaml, nested, to_plain, to_yaml
from fastflower.yaml_files import Dumper, read_yaml
from tests.conftest import fastflower

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TEXTS = [path.read_text(encoding="utf-8") for path in CONFIGS] + [to_yaml(Config())]


def loaded(text: str | bytes, folder: Path) -> Any:
    (folder / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(folder / "x.yaml")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *(
            (word, word)
            for word in ("on", "off", "yes", "no", "On", "NO", "y", "n", "None", "none", "1:30", "2026-01-01")
        ),
        *((word, word) for word in ("1_000", "0b1", "1e", "e3", ".", "1.2.3", "0o8", "+", "nUll", "resnet34")),
        *((word, None) for word in ("~", "null", "Null", "NULL", "")),
        *((word, True) for word in ("true", "True", "TRUE")),
        ("False", False),
        *((word, 10) for word in ("10", "010", "0o12", "0xA", "+10")),
        *((word, 1e-4) for word in ("1e-4", "1E-4", "1.e-4", ".0001", "0.0001", "1.0e-4")),
        *((word, 1e5) for word in ("1e5", "1e+5", "100000.")),
        ("-.inf", -math.inf),
    ],
)
def test_plain_words_are_those_of_version_1_2(word: str, value: Any, tmp_path: Path) -> None:
    assert loaded(f"a: {word}\n", tmp_path) == {"a": value}
    assert type(loaded(f"a: {word}\n", tmp_path)["a"]) is type(value)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    st.sampled_from(["on", "off", "1e3", "0o7", "null", "~", "none", "010", "1_0", "<<", "=", ".inf", "true", "1:30"]),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("abc.:-# 0", min_size=1, max_size=5), st.one_of(SCALARS, st.lists(SCALARS, max_size=4))))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=None, width=120)
    assert loaded(text, tmp_path_factory.mktemp("yaml")) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_files_of_any_unicode_encoding_with_its_mark_are_read(encoding: str, tmp_path: Path) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    for line_end in ("\n", "\r\n"):
        assert loaded(mark + f"a: öß{line_end}b: 花{line_end}".encode(encoding), tmp_path) == {"a": "öß", "b": "花"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  epochs: 1\n  lr: 1\n  epochs: 2\n", "the key epochs stands twice, in lines 2 and 4: keep one"),
        ("train: {epochs: 1, epochs: 2}", "the key epochs stands twice, in lines 1 and 1"),
        ("train: {}\ndata: {}\ntrain: {}\n", "the key train stands twice, in lines 1 and 3"),
        ("amp: true\n---\namp: false\n", "line 2 begins another document, by ---: keep one in a file"),
        ("train:\n\tepochs: 1\n", "there is a tab in line 2: indent by spaces"),
        ("train:\n  epochs: 1\n\tlr: 1\n", "there is a tab in line 3: indent by spaces"),
        ("a: 'x", "line 1: while scanning a quoted scalar found unexpected end of stream"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: 0x" + "f" * 5000, "is not YAML"),
        ("[" * 5000, "is not YAML"),
        (b"a: \xff\n", "is no text in UTF-8 (byte 3): save it as UTF-8."),
        ("a: b".encode("utf-16-le"), "zero bytes: save it as UTF-8."),
        ("a: \x07", "is not YAML"),
        ("- a", "holds no settings"),
        ("text", "holds no settings"),
        (
            "train.epochs: 1\ntrain: {epochs: 2}",
            "train.epochs stands beside train, which gives it too: keep one",
        ),
        ("train.epochs: 1\ntrain: 5", "train.epochs stands beside train"),
        ("train.epoch: 1", "there is no setting train.epoch; did you mean train.epochs?"),
        ("train: &a {train: *a}", "there is no setting train.train"),
        ("data: {sizes: &a [*a]}", "data.sizes is "),
        ("1: 2", "there is no setting 1; "),
        ("? [a]\n: 2", "is not YAML"),
        ("data: {cache: true}", "data.cache is True: it takes off, ram, gpu or auto."),
        ("train: {epochs: true}", "train.epochs is True: it takes a whole number above 0 or none."),
        ("train: {nesterov: perhaps}", "train.nesterov is perhaps: it takes on or off."),
    ],
)
def test_what_is_no_file_of_settings_is_one_sentence(text: str | bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    result = fastflower("train", "--config", tmp_path / "x.yaml")
    assert result.code == 2
    assert sentence in result.err
    assert str(tmp_path / "x.yaml") in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("---\namp: true\n", {"amp": True}),
        ("train:\n", {}),
        ("data: {cache: off}", {"data": {"cache": "off"}}),
        ("train: {nesterov: yes}", {"train": {"nesterov": True}}),
        ("train: {nesterov: off, compile: on}", {"train": {"nesterov": False, "compile": True}}),
        ("train: {compile: auto}", {}),
        ("train: {weight_decay: 1e-3}", {"train": {"weight_decay": 1e-3}}),
        ("train: {weight_decay: '1e-3'}", {"train": {"weight_decay": 1e-3}}),
        *((f"data: {{val_resize: {word}}}", {"data": {"val_resize": None}}) for word in ("null", "None", "none", "~")),
        ("train: {class_weights: null}", {}),
        ("train: {class_weights: None}", {}),
        ("data: {sizes: 64}", {"data": {"sizes": [64]}}),
        ("data: {sizes: '64,96'}", {"data": {"sizes": [64, 96]}}),
        ("data: {scale: 256}", {"data": {"scale": [256, 256]}}),
        ("train: {milestones: 5}", {"train": {"milestones": [5]}}),
        ("train.epochs: 3\ndata.crop: 32\n", {"train": {"epochs": 3}, "data": {"crop": 32}}),
        ("train.epochs: 3\ntrain: {lr: 1}\n", {"train": {"epochs": 3, "lr": 1.0}}),
        ("a: &a {epochs: 3}\ntrain:\n  <<: *a\n  lr: 1\n", None),
        ("train: &t {epochs: 3}\n", {"train": {"epochs": 3}}),
    ],
)
def test_settings_mean_what_their_writers_mean(text: str, plain: dict[str, Any] | None, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    settings_read = load_yaml(tmp_path / "x.yaml")
    if plain is None:  # an anchor under a key of its own, which is no setting
        assert settings_read["train"] == {"epochs": 3, "lr": 1}
    else:
        assert build(settings_read, "") == build(plain, "")


def test_the_home_folder_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = build({"data": {"root": ["~/a", "b"], "skip": "~/c"}, "model": {"pretrained": "~/d.pth"}}, "")
    assert config.data.root == (tmp_path / "a", Path("b"))
    assert config.data.skip == tmp_path / "c"
    assert config.model.pretrained == str(tmp_path / "d.pth")


def test_nested_settings_are_as_they_were() -> None:
    plain = to_plain(Config())
    flat = {
        f"{section}.{key}": value for section in ("data", "model", "train") for key, value in plain[section].items()
    }
    flat |= {key: value for key, value in plain.items() if not isinstance(value, dict)}
    assert build(nested(flat, ""), "") == Config()
    assert nested(plain, "") == plain


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A configuration file after some accidents."""
    text = draw(st.sampled_from(TEXTS))
    pieces = [
        "\t",
        "---\n",
        "train:",
        "data: {",
        "}",
        "[",
        "*a",
        "&a ",
        "<<: ",
        "!!int ",
        '"',
        "'",
        "\\",
        "~",
        "#",
        ": ",
    ]
    pieces += [
        "null",
        "off",
        "1e-4",
        "-1",
        ".nan",
        "9" * 400,
        "\x00",
        "\ufeff",
        "花",
        "| \n",
        "? ",
        "- ",
        "%YAML 1.1\n",
    ]
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 12))
        text = text[:at] + draw(st.sampled_from(["", *pieces])) + text[at + cut :]
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-16-le", "utf-8-sig"])))
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


@settings(max_examples=400, deadline=None)
@given(content=mutated())
def test_no_file_ends_in_a_traceback(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("mutated") / "x.yaml"
    path.write_bytes(content)
    sentence = "."
    try:
        config = build(load_yaml(path), str(path))
    except UserError as error:
        sentence = str(error)
    else:
        assert build(to_plain(config), "") == config
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
