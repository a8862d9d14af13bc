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
from fastflower.evaluation.answers import require_form
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
from fastflower.evaluation.session import EvaluationSettings, open_session, trained_on, views_of
from fastflower.evaluation.submission import form_of
from fastflower.evaluation.trained_run import open_trained
from fastflower.evaluation.views import Views
from fastflower.files import require_writable
from fastflower.runtime.run_folder import RunFolder
from fastflower.tables import NOTHING, TITLES, new_table, written
from fastflower.training.metrics import Evaluation


@dataclass(frozen=True)
class Row:
    """A line of `members_table`."""

    name: str
    views: str  # in words; empty where it is not known
    evaluation: Evaluation | None = None  # where the true classes are known
    weight: float | None = None


@dataclass(frozen=True)
class Ensembled:
    """An ensemble, with the views of each member, and the figures of all where the true classes are known."""

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
    views: Views | None = None,
    mix_views: bool = False,
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
        views: by which runs are predicted; None = one crop.
        mix_views: combine members that were predicted by other views than others.
        fit_on: of each member what weights are fitted on; empty = the same predictions where they have true classes,
            else the runs' val.
        out: a predictions file of the ensemble (see `fastflower.evaluation.answers.answers_writer`); None = none is
            written.
        submission: the competition's CSV; None = none is written.
        sample: a sample submission, whose ids must be those of the members.

    Raises:
        UserError: as `combine` and `fit_weights`; a member that cannot be had, or views that differ unasked.
    """
    if out:
        require_form(out)
    if submission:
        require_writable(submission)
    settings = EvaluationSettings(roots, views=views or Views())
    # refuses before hours of work
    members, _ = _find_all(paths, method, split, settings, fit_on, console, mix_views=mix_views, ahead=True)
    joined, weights, notes = join(members), None, []
    if sample:
        form_of(joined[0].classes, joined[0].ids.tolist(), sample)
    members, others = _find_all(paths, method, split, settings, fit_on, console, mix_views=mix_views)
    joined = join(members)
    if others:
        weights = fit_weights(others)
        if others is members:
            notes.append("The weights were fitted on these very pictures, which flatters the ensemble's figures.")
    combined = combine(members, method, weights)
    shares = [None] * len(members) if weights is None else weights.tolist()
    rows = [
        Row(member.name, views_of(member.predictions.source), _figures(own, combined), share)
        for member, own, share in zip(members, joined, shares, strict=True)
    ]
    rows.append(Row(method, views_of(combined.source), _figures(combined, combined)))
    if combined.labelled and method == "vote":
        notes.append("The vote's loss is that of (votes + mean probability) / (members + 1).")
    notes += _seen(members, "says nothing of new ones") if combined.labelled else []
    notes += _seen(others, "flatters its weight") if others is not members else []
    notes += _other_views(paths, split, settings)
    notes += hand_in(combined, out=out, submission=submission, sample=sample)
    return Ensembled(combined, rows, notes)


def _find_all(
    paths: Sequence[Path],
    method: Method,
    split: str,
    settings: EvaluationSettings,
    fit_on: Sequence[Path],
    console: Console,
    *,
    mix_views: bool,
    ahead: bool = False,
) -> tuple[list[Member], list[Member]]:
    """The members, and what their weights are fitted on, if any are; see `ensemble_runs` and, for `ahead`,
    `predictions_of`.

    Raises:
        UserError: one of them cannot be had, or they do not belong together.
    """
    members = [find_member(path, split, settings, console, ahead=ahead) for path in paths]
    joined = join(members)
    if not mix_views:
        _require_same_views(members)
    if method != "weighted":
        return members, []
    others, labelled = members, bool((true_classes(joined) != NO_LABEL).all())
    if fit_on or not labelled:
        if len(fit_on or paths) != len(members):
            raise UserError(f"--fit-on names {len(fit_on)} predictions for {len(members)} members: give one for each.")
        if not fit_on:
            _refuse_files(paths)
        others = [find_member(path, "val", settings, console, ahead=ahead) for path in fit_on or paths]
    join_labelled(others)
    return members, others


def _require_same_views(members: Sequence[Member]) -> None:
    """Raise UserError where members were predicted by other views than others; what does not say so fits all."""
    by_views = {views: member.name for member in members if (views := views_of(member.predictions.source))}
    if len(by_views) > 1:
        named = " and ".join(f"{name} by {views}" for views, name in sorted(by_views.items()))
        raise UserError(
            f"the members were predicted by several views, {named}: predict each by the same (--crops, --scales), or "
            "give --mix-views."
        )


def _figures(predictions: Predictions, combined: Predictions) -> Evaluation | None:
    """Those of predictions, with all that is known of the true classes; None where that is not all."""
    return metrics_of(replace(predictions, labels=combined.labels)) if combined.labelled else None


def _seen(members: Sequence[Member], consequence: str) -> list[str]:
    """A sentence about each member that has trained on what it predicts."""
    return [
        f"{member.name} trained on these pictures, which {consequence}."
        for member in members
        if trained_on(member.predictions.source)
    ]


def _other_views(paths: Sequence[Path], split: str, settings: EvaluationSettings) -> list[str]:
    """A sentence about predictions that runs also have, by views that were not asked for."""
    wanted = RunFolder(Path()).predictions(split, settings.views.suffix).name
    names = {
        path.name
        for run in paths
        if run.is_dir()
        for path in RunFolder(run).results()
        if path.name.startswith(f"predictions-{split}") and not path.stem.endswith("-last")
    }
    others = ", ".join(sorted(names - {wanted}))
    return [f"Runs also have {others}: --crops and --scales say which are combined."] if others else []


def find_member(
    path: Path, split: str, settings: EvaluationSettings, console: Console, *, ahead: bool = False
) -> Member:
    """A run's predictions of a split, made now where they are missing or of other weights, pictures or views; or a
    file's.

    For `ahead` see `fastflower.evaluation.predict.predictions_of`.

    Raises:
        UserError: there is nothing of the kind, or predicting fails.
    """
    if path.is_file() and path.suffix != ".pt":
        return Member(str(path), read_predictions(path))

    def predicted(run: Path) -> Predictions:
        trained = open_trained(run)
        with open_session(trained, settings, console) as session:
            return predictions_of(trained, split, settings, session, ahead=ahead)

    folds = [] if RunFolder(path).best.is_file() else folds_of(path)
    return Member(str(path), of_folds([predicted(fold) for fold in folds], split) if folds else predicted(path))


def folds_of(path: Path) -> list[Path]:
    """The runs of a folder of cross-validation, in their order; none where it is no such folder, or not finished."""
    results = next(path.glob("cv*.json"), None)  # of whichever views
    folds = json.loads(results.read_bytes())["folds"] if results else []
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
            f"{files[0]} has no true classes to fit weights on: give --fit-on with predictions of a split that has "
            "some, one for each member in the same order."
        )


def members_table(rows: Sequence[Row]) -> Table:
    """Views and figures of members and ensemble, for a terminal; weights and figures where there are some."""
    weighted = any(row.weight is not None for row in rows)
    metrics = ("accuracy", "top5", "macro_f1", "loss") if any(row.evaluation for row in rows) else ()
    grid = new_table("member", "views", *["weight"] * weighted, *(TITLES[metric] for metric in metrics), names=2)
    for row in rows:
        weight = ["" if row.weight is None else f"{row.weight:.3f}"] * weighted
        figures = (written(metric, getattr(row.evaluation, metric)) for metric in metrics)
        grid.add_row(Text(row.name), row.views or NOTHING, *weight, *figures)
    return grid
