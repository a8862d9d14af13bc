"""`import fastflower`: the steps of a run as functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastflower
from fastflower.errors import in_python
from fastflower.evaluation.predictions import read_predictions
from fastflower.given import Count, Sizes, StrPath, reading_arguments
from fastflower.runtime.checkpoint import load_checkpoint
from tests.conftest import ROOT, train_arguments, write_dataset
from tests.conftest import fastflower as command
from tests.training.test_run import without_times

SETTINGS: dict[str, Any] = {
    "data": {"crop": 32, "scale": [36, 48], "val_resize": 36},
    "model": {"name": "resnet18"},
    "train": {"batch_size": 8, "lr": 0.02, "epochs": 1},
}


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    return SETTINGS | {"data": {**SETTINGS["data"], "root": str(root)}} | changes


def test_train_and_evaluate_are_the_commands(small: Path, tmp_path: Path, tiny_net: None) -> None:
    config = fastflower.load_config(settings=settings(small))
    run = fastflower.train(config, tmp_path / "library", quiet=True)
    assert command(*train_arguments(small, tmp_path / "command"), "--train.epochs", "1").code == 0
    assert without_times(run) == without_times(tmp_path / "command")
    evaluation = fastflower.evaluate(run)
    assert evaluation.n == 20
    assert evaluation.loss == pytest.approx(without_times(run)[0]["val_loss"], abs=1e-6)
    other = write_dataset(tmp_path / "other", {"val": 6})
    assert fastflower.evaluate(run, root=other).n == 6
    with pytest.raises(fastflower.UserError, match="already holds a run"):
        fastflower.train(config, run, quiet=True)
    for crops in (0, 3, -10):
        with pytest.raises(fastflower.UserError, match=f"crops is {crops}: give 1, the center, or 10"):
            fastflower.evaluate(run, crops=crops)


def test_a_loop_of_ones_own(small: Path, tiny_net: None) -> None:
    config = fastflower.load_config(settings=settings(small))
    data = fastflower.load_data(config)
    network = fastflower.build_model(config, len(data.dataset.classes))
    batches = list(data.train.epoch(0))
    assert [len(batch.labels) for batch in batches] == [8] * 6
    assert network(batches[0].images).shape == (8, 3)
    assert data.val is not None
    assert sum(len(batch.labels) for batch in data.val.once()) == 20


def test_pretrained_weights_bring_their_normalization_and_rate(small: Path, tmp_path: Path, tiny_net: None) -> None:
    given = settings(small, train={"batch_size": 8, "epochs": 1})
    run = fastflower.train(fastflower.load_config(settings=given), tmp_path / "run", quiet=True)
    source = run / "checkpoints/best.safetensors"
    other = write_dataset(tmp_path / "other", {"train": 8, "val": 4}, first=500)
    model = {"name": "resnet18", "pretrained": str(source)}
    config = fastflower.load_config(settings=settings(other, model=model, train={"batch_size": 8}))
    assert config.train.lr == 0.01
    saved = load_checkpoint(run / "checkpoints/best.pt")
    data = fastflower.load_data(config)
    assert list(data.normalization.mean) == saved["normalization"]["mean"]
    assert torch.equal(fastflower.build_model(config, 3).state_dict()["conv1.weight"], saved["model"]["conv1.weight"])


def test_configurations_have_names_and_defaults() -> None:
    assert fastflower.load_config("resnet50").model.name == "resnet50"
    assert fastflower.load_config("demo", {"train": {"epochs": 2}}).train.epochs == 2
    assert fastflower.load_config().train.lr == 0.1
    with pytest.raises(fastflower.UserError, match="did you mean train.epochs"):
        fastflower.load_config("demo", {"train": {"epoch": 2}})
    with pytest.raises(fastflower.UserError, match="none.yaml cannot be read"):
        fastflower.load_config("none.yaml")


def test_settings_are_nested_or_dotted_or_both(small: Path) -> None:
    wanted = fastflower.load_config(settings=settings(small))
    flat = {f"{section}.{key}": value for section, inside in settings(small).items() for key, value in inside.items()}
    assert fastflower.load_config(settings=flat) == wanted
    half = {key: value for key, value in flat.items() if not key.startswith("train.")}
    assert fastflower.load_config(settings=half | {"train": settings(small)["train"]}) == wanted
    mixed = {"data.crop": 32, "data": {"scale": [36, 48], "val_resize": 36}, "seed": 3}
    config = fastflower.load_config("demo", mixed)
    assert (config.data.crop, config.data.scale, config.seed) == (32, (36, 48), 3)


def test_what_is_wrong_is_blamed_on_where_it_is(tmp_path: Path) -> None:
    good, bad, pair = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "pair.yaml"
    good.write_text("train: {epochs: 3}")
    bad.write_text("train: {epoch: 3}")
    pair.write_text("data: {crop: 300, scale: [256, 480]}")
    for source, given_settings, words in [
        (good, {"train.epoch": 2}, "^settings: there is no setting train.epoch; did you mean train.epochs"),
        (good, {"train": {"epochs": "many"}}, "^settings: train.epochs is many: it takes a whole number"),
        (
            good,
            {"data.crop": 300, "data.scale": [256, 480]},
            "^settings: data.scale starts at 256 pixels, below data.crop",
        ),
        (good, {"train": 3}, "^settings: train is 3: it takes keys such as"),
        (good, {"train.epochs": 3, "train": {"epochs": 3}}, "^settings: train.epochs stands beside train"),
        (good, {"train.epochs": 3, "train": 4}, "^settings: train.epochs stands beside train"),
        (good, {3: 4}, "^settings: there is no setting 3"),
        (good, [("train.epochs", 3)], "^settings is list: give a dict"),
        (bad, {"train.epochs": 2}, f"^{bad}: there is no setting train.epoch"),
        (pair, {"train.epochs": 2}, f"^{pair}: data.scale starts at 256"),
        ({"train.epochs": 2}, None, "^source is dict: give a file or a name, and your own settings as settings"),
    ]:
        with pytest.raises(fastflower.UserError, match=words):
            fastflower.load_config(source, given_settings)  # type: ignore[arg-type]


def test_a_dict_that_names_pictures_is_fitted_to_them_as_by_the_command(
    small: Path, tmp_path: Path, tiny_net: None
) -> None:
    named = {"data.root": str(small), "train.epochs": 1}
    fitted = fastflower.fit_config(small, {"train.epochs": 1}, quiet=True)
    assert fitted != fastflower.load_config(settings=named)
    run = fastflower.train(named, tmp_path / "run", quiet=True)
    assert fastflower.load_config(run / "config.yaml") == fitted
    folds = fastflower.cross_validate(named, tmp_path / "cv", folds=2, quiet=True)
    assert len(folds.folds) == 2
    fold = fastflower.load_config(tmp_path / "cv/fold-0/config.yaml")
    assert (fold.model, fold.train.batch_size, fold.data.folds) == (fitted.model, fitted.train.batch_size, 2)


def test_fit_config_refuses_what_it_would_not_heed(small: Path) -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: fastflower.fit_config(small, recipe="finetuned"), "^recipe is finetuned: it takes auto, finetune or"),  # type: ignore[arg-type]
        (lambda: fastflower.fit_config(small, {"data.root": "other"}), "^settings: data.root names pictures beside"),
        (lambda: fastflower.fit_config(small, "train.epochs=1"), "^settings is str: give a dict"),  # type: ignore[arg-type]
    ]
    for function, words in refused:
        with pytest.raises(fastflower.UserError, match=words):
            function()


def test_a_dict_is_a_configuration(small: Path, tmp_path: Path, tiny_net: None) -> None:
    run = fastflower.train(settings(small), tmp_path / "run", quiet=True)
    assert (run / "config.yaml").is_file()
    assert len(fastflower.load_data({**settings(small), "seed": 4}).dataset.classes) == 3
    assert fastflower.build_model(settings(small), 3).training
    for wrong in ("demo", None, 7):
        with pytest.raises(fastflower.UserError, match=f"config is {type(wrong).__name__}: give what load_config"):
            fastflower.train(wrong, tmp_path / "other")  # type: ignore[arg-type]


def test_epochs_and_places_begin_at_zero(small: Path, tiny_net: None) -> None:
    train = fastflower.load_data(settings(small)).train
    for epoch, start in ((-1, 0), (0, -1), (2**63, 0), (-(2**70), 0)):
        with pytest.raises(fastflower.UserError, match=rf"epoch is {epoch} and start {start}: .* from 0"):
            train.epoch(epoch, start)
    assert len(list(train.epoch(2**63 - 1))) == 6
    assert list(train.epoch(0, 48)) == []


def test_resuming_goes_on_as_the_command_does(small: Path, tmp_path: Path, tiny_net: None) -> None:
    two = {"batch_size": 8, "lr": 0.02, "epochs": 2}
    whole = fastflower.train(settings(small, train=two), tmp_path / "a", quiet=True)
    part = fastflower.train(settings(small, train={**two, "max_steps": 4}), tmp_path / "b", quiet=True)
    assert fastflower.resume(part, {"train.max_steps": None}, quiet=True) == part
    assert without_times(part) == without_times(whole)
    wrong: list[tuple[Path | str, str]] = [
        (tmp_path / "none", "^fastflower.resume\\(.*there is no"),
        ("auto", "auto is no run"),
    ]
    for run, words in wrong:
        with pytest.raises(fastflower.UserError, match=words):
            fastflower.resume(run)
    with pytest.raises(fastflower.UserError, match="already holds a run: give fastflower.resume.*, overwrite=True or"):
        fastflower.train(settings(small), part, quiet=True)
    with pytest.raises(fastflower.UserError, match="settings: there is no setting train.epoch"):
        fastflower.resume(part, {"train.epoch": 3})


def test_splits_ensembles_and_folds_are_the_commands(tmp_path: Path, tiny_net: None) -> None:
    root = write_dataset(tmp_path / "data", {"train": 24, "val": 9, "test": 6})
    for seed in (0, 1):
        fastflower.train(settings(root, seed=seed), tmp_path / f"run{seed}", quiet=True)
    run, runs = tmp_path / "run0", [tmp_path / "run0", tmp_path / "run1"]
    predictions = fastflower.predict(run, split="val", submission=tmp_path / "s.csv")
    assert command("predict", run, "--split", "val", "--out", tmp_path / "p.parquet").code == 0
    np.testing.assert_array_equal(predictions.probabilities, read_predictions(tmp_path / "p.parquet").probabilities)
    assert (tmp_path / "s.csv").read_text().startswith("id,label")
    assert len(fastflower.predict(run)) == 6
    together = fastflower.ensemble(runs, "mean", split="val", out=tmp_path / "e.csv")
    mean = np.mean([fastflower.predict(run, split="val").probabilities for run in runs], axis=0)
    np.testing.assert_allclose(together.predictions.probabilities, mean, atol=1e-6)
    assert [row.name for row in together.rows] == [*map(str, runs), "mean"]
    folds = fastflower.cross_validate(settings(root), tmp_path / "cv", folds=2, quiet=True)
    assert (len(folds.folds), folds.whole.n) == (2, 33)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: fastflower.ensemble(runs, "weighted", fit_on=runs[:1]), "fit_on names 1 predictions for 2 members"),
        (
            lambda: fastflower.predict(run, "a.jpg", split="val"),
            "^split, submission, sample, data.root and data.size",
        ),
        (lambda: fastflower.predict(run, "a.jpg", out="x.txt"), "is none of .csv, .json, .parquet"),
        (lambda: fastflower.cross_validate(settings(root), tmp_path / "cv", folds=1), "config: data.folds is 1"),
        (lambda: fastflower.cross_validate(settings(root), tmp_path / "cv", folds=3), "overwrite=True or another run"),
        (lambda: fastflower.evaluate(run, crops=10, scales=[32]), "^crops=10 and scales are two ways to test"),
        (lambda: fastflower.load(run, scales=[8]), "^scales=8 is smaller than data.crop"),
        (lambda: fastflower.load(tmp_path), "holds 2 runs"),
    ]
    for function, words in refused:
        with pytest.raises(fastflower.UserError, match=words) as error:
            function()
        assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("give --overwrite or another --run.", "give overwrite=True or another run."),
        ("give --resume runs/a, --overwrite or", 'give fastflower.resume("runs/a"), overwrite=True or'),
        ("give --resume 'my runs/a', or", 'give fastflower.resume("my runs/a"), or'),
        ("--crops 10 and --scales 224,256 differ: --crops 1.", "crops=10 and scales=(224, 256) differ: crops=1."),
        ("give a larger --train.epochs, or --device cpu.", 'give a larger train.epochs, or device="cpu".'),
        ("(--mix-views) or --batch-size 3; --sizes.", "(mix_views=True) or batch_size=3; sizes."),
        ("what `fastflower data check ROOT --json` prints", "what `fastflower data check ROOT --json` prints"),
    ],
)
def test_options_are_arguments_in_python(sentence: str, wanted: str) -> None:
    assert in_python(sentence) == wanted


def test_no_sentence_keeps_an_option_in_python() -> None:
    """Of all literals in the code that tell of one."""
    literals = [
        node.value
        for path in (ROOT / "fastflower").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search("--[a-z]", node.value)
    ]
    assert len(literals) > 30
    for text in literals:
        outside = "".join(in_python(text).split("`")[::2]) if text.count("`") % 2 == 0 else ""
        assert not re.search("--[a-z]", outside), text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fastflower.load(None), "run is None: it takes a path"),  # type: ignore[arg-type]
        (lambda: fastflower.load("r", device="gpu"), "device is gpu: it takes run, auto, cpu or cuda"),  # type: ignore[arg-type]
        (lambda: fastflower.load("r", batch_size=0), "batch_size is 0: it takes a whole number above 0 or none"),
        (lambda: fastflower.load("r", batch_size=2.5), "batch_size is 2.5: it takes"),  # type: ignore[arg-type]
        (lambda: fastflower.evaluate("r", split="vall"), "split is vall: .*did you mean val"),  # type: ignore[arg-type]
        (lambda: fastflower.evaluate("r", scales=(64, 0)), "scales is .64, 0.: it takes one or more whole numbers"),
        (lambda: fastflower.evaluate("r", root=3), "int is no path"),  # type: ignore[arg-type]
        (lambda: fastflower.predict("r", []), "pictures is empty"),
        (lambda: fastflower.predict("r", ""), "a path is empty"),
        (lambda: fastflower.load(""), "run is empty: it takes a path"),
        (lambda: fastflower.predict("r", 3), "int is no path"),  # type: ignore[arg-type]
        (lambda: fastflower.predict("r", "a.jpg", top=0), "top is 0: it takes a whole number above 0"),
        (lambda: fastflower.ensemble(["a", "b"], "max"), "method is max: it takes vote, mean or weighted"),  # type: ignore[arg-type]
        (lambda: fastflower.cross_validate({}, "r", folds=0), "folds is 0: it takes"),
        (lambda: fastflower.build_model({}, 0), "classes is 0: it takes a whole number above 0"),
    ],
)
def test_an_argument_of_another_kind_is_one_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(fastflower.UserError, match=words):
        call()


def test_one_scale_needs_no_list_and_arrays_are_lists() -> None:
    @reading_arguments
    def taken(run: StrPath, scales: Sizes = (), batch_size: Count | None = None) -> tuple[Any, ...]:
        return run, scales, batch_size

    assert taken("~/r", 64) == (Path.home() / "r", (64,), None)  # type: ignore[arg-type]
    assert taken("r", np.array([64, 80]), batch_size=np.int64(3)) == (Path("r"), (64, 80), 3)  # type: ignore[arg-type]


def test_all_functions_are_listed() -> None:
    functions = ["build_model", "cross_validate", "ensemble", "evaluate", "load", "load_config", "load_data", "predict"]
    assert dir(fastflower) == sorted(["UserError", *functions, "fit_config", "resume", "train"])
    for name in dir(fastflower):
        assert getattr(fastflower, name).__doc__


def test_importing_is_quick_and_misses_nothing() -> None:
    code = "import sys, fastflower; assert 'torch' not in sys.modules; print(fastflower.load_config.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "fastflower.api\n"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        fastflower.trian  # noqa: B018
