"""An ensemble of runs and files of predictions: from what each member says to tables and a submission."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.combine import (
    Member,
    Method,
    combine,
    fit_weights,
    join,
    join_labelled,
    metrics_of,
    true_classes,
)
from fastflower.evaluation.predict import hand_in, predictions_of
from fastflower.evaluation.predictions import Predictions, read_predictions, sort_by_id
from fastflower.evaluation.session import EvaluationSettings, open_session
from fastflower.evaluation.submission import labels_of
from fastflower.evaluation.trained_run import open_trained
from fastflower.files import require_writable
from fastflower.runtime.run_folder import RunFolder
from fastflower.training.metrics import Evaluation


@dataclass(frozen=True)
class Row:
    """A line of `metrics_table`."""

    name: str
    evaluation: Evaluation
    weight: float | None = None


@dataclass(frozen=True)
class Ensembled:
    """An ensemble, with the figures of each member and its own where the true classes are known."""

    predictions: Predictions
    rows: list[Row]
    notes: list[str]  # sentences about what was done


def ensemble_runs(
    paths: Sequence[Path],
    method: Method,
    split: str,
    console: Console,
    *,
    roots: tuple[Path, ...] | None = None,
    fit_on: Sequence[Path] = (),
    out: Path | None = None,
    submission: Path | None = None,
    sample: Path | None = None,
) -> Ensembled:
    """Combine the predictions of runs and files, and write what is asked for.

    Args:
        paths: of each member a run folder (what `predict` left there, or predicted now), a checkpoint, a folder of
            cross-validation, or a predictions file.
        method: see `combine`.
        split: which of a run's.
        console: where progress is shown.
        roots: the data's folders, for what is predicted now; None = each run's.
        fit_on: of each member what weights are fitted on; empty = the same predictions where they have true classes,
            else the runs' val.
        out: a predictions file of the ensemble; None = none is written.
        submission: the competition's CSV; None = none is written.
        sample: a sample submission, whose ids must be those of the members.

    Raises:
        UserError: as `combine` and `fit_weights`, or a member that cannot be had.
    """
    for path in (out, submission):
        if path:
            require_writable(path)
    members, _ = _find_all(paths, method, split, roots, fit_on, console, ahead=True)  # refuses before hours of work
    joined, weights, notes = join(members), None, []
    if sample:
        labels_of(joined[0].classes, joined[0].ids.tolist(), sample)
    members, others = _find_all(paths, method, split, roots, fit_on, console)
    joined = join(members)
    if others:
        weights = fit_weights(others)
        if others is members:
            notes.append("The weights were fitted on these very pictures, which flatters the ensemble's figures.")
    combined = combine(members, method, weights)
    rows = []
    if combined.labelled:
        labelled = [replace(predictions, labels=combined.labels) for predictions in joined]
        shares = [None] * len(members) if weights is None else weights.tolist()
        rows = [
            Row(member.name, metrics_of(own), share)
            for member, own, share in zip(members, labelled, shares, strict=True)
        ]
        rows.append(Row(method, metrics_of(combined)))
        if method == "vote":
            notes.append("The vote's loss is that of (votes + mean probability) / (members + 1).")
    notes += hand_in(combined, out=out, submission=submission, sample=sample)
    return Ensembled(combined, rows, notes)


def _find_all(
    paths: Sequence[Path],
    method: Method,
    split: str,
    roots: tuple[Path, ...] | None,
    fit_on: Sequence[Path],
    console: Console,
    *,
    ahead: bool = False,
) -> tuple[list[Member], list[Member]]:
    """The members, and what their weights are fitted on, if any are; see `ensemble_runs` and, for `ahead`,
    `predictions_of`.

    Raises:
        UserError: one of them cannot be had, or they do not belong together.
    """
    members = [find_member(path, split, roots, console, ahead=ahead) for path in paths]
    joined = join(members)
    if method != "weighted":
        return members, []
    others, labelled = members, bool((true_classes(joined) != NO_LABEL).all())
    if fit_on or not labelled:
        if len(fit_on or paths) != len(members):
            raise UserError(f"--fit_on names {len(fit_on)} predictions for {len(members)} members: give one for each.")
        if not fit_on:
            _refuse_files(paths)
        others = [find_member(path, "val", roots, console, ahead=ahead) for path in fit_on or paths]
    join_labelled(others)
    return members, others


def find_member(
    path: Path, split: str, roots: tuple[Path, ...] | None, console: Console, *, ahead: bool = False
) -> Member:
    """A run's predictions of a split, made now where they are missing or of other weights or pictures; or a file's.

    For `ahead` see `fastflower.evaluation.predict.predictions_of`.

    Raises:
        UserError: there is nothing of the kind, or predicting fails.
    """
    if path.is_file() and path.suffix != ".pt":
        return Member(str(path), read_predictions(path))

    def predicted(run: Path) -> Predictions:
        trained = open_trained(run)
        settings = EvaluationSettings(roots)
        with open_session(trained, settings, console) as session:
            return predictions_of(trained, split, settings, session, any_views=True, ahead=ahead)

    folds = [] if RunFolder(path).best.is_file() else folds_of(path)
    return Member(str(path), of_folds([predicted(fold) for fold in folds], split) if folds else predicted(path))


def folds_of(path: Path) -> list[Path]:
    """The runs of a folder of cross-validation, in their order; none where it is no such folder, or not finished."""
    results = path / "cv.json"
    folds = json.loads(results.read_bytes())["folds"] if results.is_file() else []
    return [path / f"fold-{k}" for k in range(len(folds))]


def of_folds(parts: Sequence[Predictions], split: str) -> Predictions:
    """What the folds' networks say together: of their own parts of train and val, or of test their mean.

    Raises:
        UserError: of train there is nothing, since each trained on most of it.
    """
    if split == "train":
        raise UserError("folds leave predictions of val, which is all of train and val, and of test: give one of them.")
    if split == "test":
        return combine([Member(f"fold-{k}", part) for k, part in enumerate(parts)], "mean")
    return sort_by_id(
        Predictions(
            split,
            parts[0].classes,
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.labels for part in parts]),
            {"folds": [part.source for part in parts]},
        )
    )


def _refuse_files(paths: Sequence[Path]) -> None:
    """Raise UserError for a file, of which it is not known where its val is."""
    if files := [path for path in paths if path.is_file() and path.suffix != ".pt"]:
        raise UserError(
            f"{files[0]} has no true classes to fit weights on: give --fit_on with predictions of a split that has "
            "some, one for each member in the same order."
        )


def metrics_table(rows: Sequence[Row]) -> Table:
    """Figures of members and ensemble, for a terminal; weights where there are some."""
    weighted = any(row.weight is not None for row in rows)
    grid = Table("", *["weight"] * weighted, "top-1", "top-5", "macro F1", "loss")
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in rows:
        weight = ["" if row.weight is None else f"{row.weight:.3f}"] * weighted
        metrics = row.evaluation
        shares = (f"{share:.2%}" for share in (metrics.accuracy, metrics.top5))
        grid.add_row(Text(row.name), *weight, *shares, f"{metrics.macro_f1:.4f}", f"{metrics.loss:.4f}")
    return grid
