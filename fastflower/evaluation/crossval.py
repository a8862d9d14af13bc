"""Cross-validation: each fold validates a network that the others trained.

A folder holds fold-0, fold-1, ... as runs, cv.json with the metrics of all, and the predictions of the whole: of train
and val, where each picture is predicted by the network that did not train on it, and of test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastflower.config import SPLITS, Config, resolve
from fastflower.data.contents import examined
from fastflower.data.dataset import with_folders
from fastflower.data.folds import duplicates
from fastflower.data.identity import identity
from fastflower.data.splits import class_list, join, load_pool
from fastflower.errors import UserError
from fastflower.evaluation.combine import metrics_of
from fastflower.evaluation.ensemble import of_folds
from fastflower.evaluation.predict import hand_in, predictions_of, require_predictable
from fastflower.evaluation.predictions import write_predictions
from fastflower.evaluation.session import SHOWN, EvaluationSettings, Session
from fastflower.evaluation.trained_run import Planned, Trained, open_trained
from fastflower.evaluation.views import Views
from fastflower.files import as_word, atomic_write, remove_temporaries, require_writable, to_json
from fastflower.layers import Layer, Layers
from fastflower.runtime.checkpoint import load_checkpoint, load_trained
from fastflower.runtime.device import choose_device
from fastflower.runtime.distributed import Ranks, processes
from fastflower.runtime.launcher import local_rank
from fastflower.runtime.lock import own_folder
from fastflower.runtime.progress import Display
from fastflower.runtime.repeatable import repeatable
from fastflower.runtime.run_folder import RunFolder, changes
from fastflower.runtime.signals import Signals, Stopped
from fastflower.tables import TITLES, new_table, written
from fastflower.training.fit import settings_of
from fastflower.training.metrics import Evaluation
from fastflower.training.run import train_into
from fastflower.training.setup import prepare

METRICS = ("loss", "accuracy", "top5", "macro_f1")
# Settings that may differ between the folds, and from call to call: what is computed stays the same, but for records
# that turn out to be bad, and are left out from there on.
HARMLESS = (
    "data.skip",
    *("device", "data.decoder", "data.decode", "data.threads", "data.prefetch", "data.cache", "data.hw_decoder_load"),
    *("train.compile", "train.compile_mode", "train.deterministic", "train.log_every", "train.profile"),
)


@dataclass(frozen=True)
class Fold:
    """A part that validates the network that the others train."""

    folder: RunFolder
    settings: Config
    checkpoint: Path | None  # to go on from
    finished: bool = False


@dataclass(frozen=True)
class CrossValidation:
    """What the folds have come to."""

    folds: list[Evaluation]  # each on its own part, every picture once
    whole: Evaluation  # of all those predictions together

    def mean(self, metric: str) -> float:
        """Over the folds."""
        return float(np.mean([getattr(fold, metric) for fold in self.folds]))

    def std(self, metric: str) -> float:
        """Standard deviation over the folds, with n - 1."""
        return float(np.std([getattr(fold, metric) for fold in self.folds], ddof=1))

    def to_plain(self) -> dict[str, Any]:
        """What cv.json holds."""
        return {
            "folds": [asdict(fold) for fold in self.folds],
            "mean": {metric: self.mean(metric) for metric in METRICS},
            "std": {metric: self.std(metric) for metric in METRICS},
            "together": asdict(self.whole),
        }


def cross_validate(
    layers: Layers,
    *,
    name: str,
    run: Path | None,
    overwrite: bool,
    views: Views,
    test: bool,
    submission: Path | None,
    console: Console,
) -> CrossValidation:
    """Train and predict the folds of data.folds, one after another; finished ones are not trained again.

    Args:
        layers: the settings; data.fold is of no account. A recipe is fitted once, to the first fold, and an earlier
            call's choice stays.
        name: of a new folder under runs/.
        run: the folder, which may hold folds of an earlier call; None = a new one.
        overwrite: begin anew, whatever the folder holds.
        views: by which each picture is predicted.
        test: predict the test split too, as the mean of the folds' probabilities.
        submission: the competition's CSV of that; None = none is written.
        console: where progress is shown.

    Raises:
        UserError: as training and prediction; or `run` holds folds of other settings.
        Stopped: a signal came; all steps until then are saved.
    """
    config, settings = resolve(layers.typed()), EvaluationSettings(views=views)
    test = test or submission is not None
    device = choose_device(config.device, local_rank())
    with (
        processes(device) as ranks,
        repeatable(config.train.deterministic, device),
        own_folder(run, name, ranks) as whole,
    ):
        if not overwrite:
            layers = ranks.gather(_as_before(layers, whole))[0]
        config = settings_of(layers, device, ranks, console)
        with Display(console, shown=ranks.is_main) as display:
            config = replace(config, data=with_folders(config.data, ranks, display))
            with ranks.main_first():
                data = _look_at(config, display)
                folds = _plan(whole, config, data, overwrite)
                if submission and ranks.is_main:
                    require_writable(submission)
        with Display(console, shown=ranks.is_main, speaks=False) as silent:
            _require_all(folds, data["classes"], test, settings, Session(device, ranks, Signals(), silent))
        with ranks.main_first():
            if ranks.is_main:
                _begin(whole.path, folds, data, overwrite)
        for fold in folds:
            if fold.finished:
                display.say(f"Fold {fold.settings.data.fold} is finished: {fold.folder.path}")
                continue
            try:
                _train(fold, device, ranks, console)
            except Stopped:
                display.say(f"Go on with the same command and --run {as_word(whole.path)}")
                raise
        with Signals() as signals, display:
            session = Session(device, ranks, signals, display)
            trained = [open_trained(fold.folder.path) for fold in folds]
            validation = _validate(whole.path, trained, settings, session)
            if test:
                _predict_test(whole.path, trained, settings, session, submission)
        return validation


def _as_before(layers: Layers, whole: RunFolder) -> Layers:
    """The settings with those that an earlier call has fitted to the data, in place of a recipe."""
    folders = (RunFolder(path) for path in sorted(whole.path.glob("fold-*")))
    checkpoint = next((folder.checkpoint for folder in folders if folder.checkpoint), None)
    if not layers.recipe or not checkpoint:
        return layers
    return layers.over(Layer(str(checkpoint), load_trained(checkpoint)["config"]))


def _plan(whole: RunFolder, config: Config, data: dict[str, Any], overwrite: bool) -> list[Fold]:
    """The folds, as far as an earlier call came.

    Raises:
        UserError: the folder holds a run, or folds of other settings, pictures or classes.
    """
    path = whole.path
    if whole.config.exists() or whole.checkpoint:
        raise UserError(f"{path} holds a run, and no folds: name another --run.")
    if not _data(path).is_file() and not any(path.glob("fold-*")):
        whole.require_own()
    folds = []
    for number in range(config.data.folds or 0):
        settings = replace(config, data=replace(config.data, fold=number))
        folder = RunFolder(path / f"fold-{number}")
        folds.append(Fold(folder, settings, None if overwrite else _checkpoint(folder, settings)))
    if not any(fold.checkpoint for fold in folds) or not _data(path).is_file():
        return folds  # nothing is known of what is there: training goes through its own checks
    if json.loads(_data(path).read_bytes()) != data:
        raise UserError(f"{path} was trained on other pictures or classes: give --overwrite or another --run.")
    return [replace(fold, finished=bool(fold.checkpoint) and _mark(fold.folder).is_file()) for fold in folds]


def _checkpoint(folder: RunFolder, settings: Config) -> Path | None:
    """Where a fold goes on from; None where it begins.

    Raises:
        UserError: it was trained with other settings.
    """
    if not folder.checkpoint:
        return None
    before = load_trained(folder.checkpoint)["config"]
    if changed := [change for change in changes(before, settings) if change.split()[0] not in HARMLESS]:
        raise UserError(
            f"{folder.path} was trained with other settings ({', '.join(changed)}): give the same, --overwrite or "
            "another --run."
        )
    return folder.checkpoint


def _mark(folder: RunFolder) -> Path:
    """A file that says that the fold is trained to its end."""
    return folder.path / "finished"


def _data(path: Path) -> Path:
    """A file that says what the folds are trained on."""
    return path / "data.json"


def _begin(path: Path, folds: Sequence[Fold], data: dict[str, Any], overwrite: bool) -> None:
    """Take away what an earlier call left half written (or all of it), and say what the folds are trained on."""
    for folder in (RunFolder(path), *(fold.folder for fold in folds)):
        for split in SPLITS:
            remove_temporaries(folder.predictions(split))
    for file in _results(path):
        remove_temporaries(file)
    if overwrite:
        _clear(path)
    with atomic_write(_data(path)) as stream:
        stream.write(to_json(data).encode())


def _train(fold: Fold, device: torch.device, ranks: Ranks, console: Console) -> None:
    """Train a fold to its end, and mark it."""
    with own_folder(fold.folder.path, "", ranks):
        train_into(fold.folder, fold.settings, fold.checkpoint, device, ranks, console)
        if ranks.is_main:
            _mark(fold.folder).touch()


def _clear(path: Path) -> None:
    """Remove what an earlier call left, and nothing else."""
    for fold in path.glob("fold-*"):
        with own_folder(fold, "", Ranks()) as folder:
            folder.clear()
            _mark(folder).unlink(missing_ok=True)
    for file in _results(path):
        file.unlink(missing_ok=True)


def _results(path: Path) -> list[Path]:
    """What is written of all folds together."""
    return [path / "cv.json", *path.glob("cv-*.json"), _data(path), *RunFolder(path).results()]


def _require_all(
    folds: Sequence[Fold], classes: list[str], test: bool, settings: EvaluationSettings, session: Session
) -> None:
    """Raise UserError, before the first fold, for whatever would be refused in a later one or after them."""
    for fold in folds:
        if not fold.finished:
            _require_trainable(fold.settings, fold.checkpoint, session)
        require_predictable(Planned(fold.settings, classes), "val", settings, session)
    if test:
        require_predictable(Planned(folds[0].settings, classes), "test", settings, session)


def _require_trainable(settings: Config, checkpoint: Path | None, session: Session) -> None:
    """Build all that a fold's training needs, and leave it again.

    Raises:
        UserError: see `prepare`; or the training would end without a network to predict by.
    """
    settings = replace(settings, data=replace(settings.data, cache="off"))
    saved = load_checkpoint(checkpoint) if checkpoint else None
    setup, _ = prepare(settings, session.device, session.ranks, session.display, saved)
    steps = settings.train.max_steps
    if steps is not None and steps < setup.train.steps:
        raise UserError(
            f"train.max_steps is {steps}, and an epoch of fold {settings.data.fold} has {setup.train.steps} steps: "
            "allow at least one epoch, after which there is a network to predict by."
        )


def _look_at(config: Config, display: Display) -> dict[str, Any]:
    """The classes, and what tells the pictures from others, as JSON has it. Says which ids are the same picture.

    Raises:
        UserError: bad data.
    """
    pool = load_pool(replace(config.data, sizes="all"))
    classes = class_list(pool)
    records = examined(join(pool, classes), display.follow("read the pictures"))
    pictures = duplicates(records)
    if pictures:
        display.say(f"{len(pictures)} pictures stand under several ids, which are kept in one fold:")
    for picture in pictures[:SHOWN]:
        several = len(picture.labels) > 1
        conflict = f", of classes {', '.join(classes[label] for label in picture.labels)}" if several else ""
        display.say(f"  {' = '.join(picture.ids)}{conflict}")
    if len(pictures) > SHOWN:
        display.say(f"  … and {len(pictures) - SHOWN} more (fastflower data check names them).")
    # with what data.skip lists, which may grow on the way
    return {"classes": classes, "records": identity(records)}


def _validate(
    path: Path, trained: Sequence[Trained], settings: EvaluationSettings, session: Session
) -> CrossValidation:
    """Each fold's part by its own network; writes cv.json and the predictions of all."""
    parts = [predictions_of(fold, "val", settings, session) for fold in trained]
    together = of_folds(parts, "val")
    validation = CrossValidation([metrics_of(part) for part in parts], metrics_of(together))
    if session.ranks.is_main:
        with atomic_write(path / f"cv{settings.views.suffix}.json") as file:
            file.write(to_json(validation.to_plain() | asdict(settings.views), indent=1).encode())
        write_predictions(RunFolder(path).predictions("val", settings.views.suffix), together)
    return validation


def _predict_test(
    path: Path, trained: Sequence[Trained], settings: EvaluationSettings, session: Session, submission: Path | None
) -> None:
    """The test split by the mean of all networks."""
    together = of_folds([predictions_of(fold, "test", settings, session) for fold in trained], "test")
    if session.ranks.is_main:
        for note in hand_in(
            together, out=RunFolder(path).predictions("test", settings.views.suffix), submission=submission
        ):
            session.display.say(note)


def summary(validation: CrossValidation) -> Table:
    """The folds' metrics, their mean and deviation, and those of all predictions together, for a terminal."""
    rows = [(str(number), asdict(fold)) for number, fold in enumerate(validation.folds)]
    grid = new_table("fold", "pictures", *(TITLES[metric] for metric in METRICS))
    for name, row in (*rows, ("together", asdict(validation.whole))):
        grid.add_row(name, f"{row['n']:,}", *(written(metric, row[metric]) for metric in METRICS))
    grid.add_section()
    for name, over_folds in (("mean", validation.mean), ("± std", validation.std)):
        grid.add_row(name, "", *(written(metric, over_folds(metric)) for metric in METRICS))
    return grid
