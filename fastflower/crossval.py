"""Cross-validation: each fold validates a network that the others trained.

A folder holds fold-0, fold-1, ... as runs, cv.json with the figures of those that are finished, and the predictions of
the whole: of train and val, where each picture is predicted by the network that did not train on it, and of test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastflower.config import Config, resolve
from fastflower.data.dataset import open_dataset
from fastflower.data.folds import duplicates
from fastflower.data.records import SPLITS
from fastflower.data.sources import class_list, join, load_pool, load_records
from fastflower.engine.checkpoint import load_checkpoint
from fastflower.engine.commands import train_into
from fastflower.engine.distributed import Ranks, processes
from fastflower.engine.lock import own_folder
from fastflower.engine.meters import Evaluation
from fastflower.engine.precision import choose_device
from fastflower.engine.progress import Display
from fastflower.engine.run import RunFolder, changes
from fastflower.engine.setup import with_data
from fastflower.engine.testing import SHOWN, Session, Testing
from fastflower.engine.trained import Trained, open_trained
from fastflower.engine.views import Views
from fastflower.ensemble import Member, combine, figures
from fastflower.errors import UserError
from fastflower.files import atomic_write, remove_temporaries, require_writable, to_json
from fastflower.launcher import local_rank
from fastflower.predict import hand_in, predictions_of
from fastflower.predictions import Predictions, sort_by_id, write_predictions
from fastflower.signals import Signals

FIGURES = ("loss", "accuracy", "top5", "macro_f1")
# Settings that may differ between the folds, and from call to call: what is computed stays the same, but for records
# that turn out to be bad, and are left out from there on.
HARMLESS = (
    "data.skip",
    *("device", "data.decoder", "data.threads", "data.prefetch", "data.cache", "data.hw_decoder_load"),
    *("train.compile", "train.compile_mode", "train.log_every", "train.profile"),
)


@dataclass(frozen=True)
class CrossValidation:
    """What the folds have come to."""

    folds: list[Evaluation]  # each on its own part, every picture once
    whole: Evaluation  # of all those predictions together

    def mean(self, figure: str) -> float:
        """Over the folds."""
        return float(np.mean([getattr(fold, figure) for fold in self.folds]))

    def std(self, figure: str) -> float:
        """Standard deviation over the folds, with n - 1."""
        return float(np.std([getattr(fold, figure) for fold in self.folds], ddof=1))

    def to_plain(self) -> dict[str, Any]:
        """What cv.json holds."""
        return {
            "folds": [asdict(fold) for fold in self.folds],
            "mean": {figure: self.mean(figure) for figure in FIGURES},
            "std": {figure: self.std(figure) for figure in FIGURES},
            "together": asdict(self.whole),
        }


def cross_validate(
    config: Config,
    *,
    name: str,
    run: Path | None,
    overwrite: bool,
    views: Views,
    test: bool,
    submission: Path | None,
    console: Console,
) -> CrossValidation | int:
    """Train and predict the folds of `config.data.folds`, one after another; finished ones are not trained again.

    Args:
        config: the settings; data.fold is of no account.
        name: of a new folder under runs/.
        run: the folder, which may hold folds of an earlier call; None = a new one.
        overwrite: begin anew, whatever the folder holds.
        views: by which each picture is predicted.
        test: predict the test split too, as the mean of the folds' probabilities.
        submission: the competition's CSV of that; None = none is written.
        console: where progress is shown.

    Returns:
        The figures, or the number of the signal that ended a fold's training.

    Raises:
        UserError: as training and prediction; or `run` holds folds of other settings.
        Interrupted: a signal came while it predicted.
    """
    config, testing = resolve(config), Testing(views=views)
    folds = range(config.data.folds or 0)
    device = choose_device(config.device, local_rank())
    with processes(device) as ranks, own_folder(run, name, ranks) as whole:
        path = whole.path
        display = Display(console, shown=ranks.is_main)
        config = with_data(config, ranks, display)
        settings = [replace(config, data=replace(config.data, fold=fold)) for fold in folds]
        with ranks.main_first():
            if whole.config.exists() or whole.checkpoint:
                raise UserError(f"{path} holds a run, and no folds: name another --run.")
            classes = _check_data(config, display)
            testing.views.check(config.data, config.model.name)
            if test or submission:
                _check_test(config, classes)
            if submission and ranks.is_main:
                require_writable(submission)
            checkpoints = [None if overwrite else _checkpoint(path, each) for each in settings]
            if ranks.is_main:
                for file in _results(path):
                    remove_temporaries(file)
                if overwrite:
                    _clear(path)
        for each, checkpoint in zip(settings, checkpoints, strict=True):
            folder = _folder(path, each)
            if _mark(folder).is_file():
                display.say(f"Fold {each.data.fold} is finished: {folder.path}")
                continue
            with own_folder(folder.path, "", ranks):
                if received := train_into(folder, each, checkpoint, device, ranks, console):
                    display.say(f"Go on with the same command and --run {path}")
                    return received
                if ranks.is_main:
                    _mark(folder).touch()
        with Signals() as signals, display:
            within = Session(device, ranks, signals, display)
            trained = [open_trained(_folder(path, each).path) for each in settings]
            found = _validate(path, trained, testing, within)
            if test or submission:
                _predict_test(path, trained, testing, within, submission)
        return found


def _folder(path: Path, settings: Config) -> RunFolder:
    return RunFolder(path / f"fold-{settings.data.fold}")


def _mark(folder: RunFolder) -> Path:
    """A file that says that the fold is trained to its end."""
    return folder.path / "finished"


def _clear(path: Path) -> None:
    """Remove what an earlier call left, and nothing else."""
    for each in path.glob("fold-*"):
        with own_folder(each, "", Ranks()) as folder:
            folder.clear()
            _mark(folder).unlink(missing_ok=True)
    for file in _results(path):
        file.unlink(missing_ok=True)


def _results(path: Path) -> tuple[Path, ...]:
    """What is written of all folds together."""
    return (path / "cv.json", *map(RunFolder(path).predictions, SPLITS))


def _checkpoint(path: Path, settings: Config) -> Path | None:
    """Where a fold goes on from; None where it begins.

    Raises:
        UserError: it was trained with other settings.
    """
    checkpoint = _folder(path, settings).checkpoint
    if not checkpoint:
        return None
    if changed := [
        change
        for change in changes(load_checkpoint(checkpoint)["config"], settings)
        if change.split()[0] not in HARMLESS
    ]:
        raise UserError(
            f"{checkpoint.parents[1]} was trained with other settings ({', '.join(changed)}): give the same, "
            "--overwrite or another --run."
        )
    return checkpoint


def _check_test(config: Config, classes: list[str]) -> None:
    """Raise UserError where the test split could not be predicted after all the training."""
    load_records(config.data, "test", classes, config.seed).require("id")


def _check_data(config: Config, display: Display) -> list[str]:
    """Say which ids are the same picture; the classes.

    Raises:
        UserError: bad data, or data that cannot be divided so.
    """
    open_dataset(config.data, config.seed)
    pool = load_pool(replace(config.data, sizes="all"))
    classes = class_list(pool)
    found = duplicates(join(pool, classes))
    if found:
        display.say(f"{len(found)} pictures stand under several ids, which are kept in one fold:")
    for each in found[:SHOWN]:
        conflict = f", of classes {', '.join(classes[label] for label in each.labels)}" if len(each.labels) > 1 else ""
        display.say(f"  {' = '.join(each.ids)}{conflict}")
    if len(found) > SHOWN:
        display.say(f"  … and {len(found) - SHOWN} more (fastflower data check names them).")
    return classes


def _validate(path: Path, trained: Sequence[Trained], testing: Testing, within: Session) -> CrossValidation:
    """Each fold's part by its own network; writes cv.json and the predictions of all."""
    parts = [predictions_of(each, "val", testing, within) for each in trained]
    together = sort_by_id(
        Predictions(
            "val",
            parts[0].classes,
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.labels for part in parts]),
            {"folds": [part.source for part in parts]},
        )
    )
    found = CrossValidation([figures(part) for part in parts], figures(together))
    if within.ranks.is_main:
        with atomic_write(path / "cv.json") as file:
            file.write(to_json(found.to_plain(), indent=1).encode())
        write_predictions(RunFolder(path).predictions("val"), together)
    return found


def _predict_test(
    path: Path, trained: Sequence[Trained], testing: Testing, within: Session, submission: Path | None
) -> None:
    """The test split by the mean of all networks."""
    members = [Member(each.folder.name, predictions_of(each, "test", testing, within)) for each in trained]
    if within.ranks.is_main:
        for note in hand_in(combine(members, "mean"), out=RunFolder(path).predictions("test"), submission=submission):
            within.display.say(note)


def summary(found: CrossValidation) -> Table:
    """The folds' figures, their mean and deviation, and those of all predictions together, for a terminal."""
    rows = [(str(fold), asdict(each)) for fold, each in enumerate(found.folds)]
    grid = Table("fold", "pictures", "loss", "top-1", "top-5", "macro F1")
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, row in (*rows, ("together", asdict(found.whole))):
        grid.add_row(name, str(row["n"]), *(_shown(figure, row[figure]) for figure in FIGURES))
    grid.add_section()
    for name, over_folds in (("mean", found.mean), ("± std", found.std)):
        grid.add_row(name, "", *(_shown(figure, over_folds(figure)) for figure in FIGURES))
    return grid


def _shown(figure: str, value: float) -> str:
    return f"{value:.2%}" if figure in ("accuracy", "top5") else f"{value:.4f}"
