"""Several networks' predictions of the same pictures as one: by votes, the mean or a weighted mean of probabilities.

No result depends on the order in which the members are given: numbers are added in the order of their size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.predict import hand_in, predictions_of
from fastflower.evaluation.predictions import (
    Predictions,
    in_order_of,
    read_predictions,
    refuse_repeated,
    some,
    sort_by_id,
)
from fastflower.evaluation.score import figures as figures_of_scores
from fastflower.evaluation.score import to_single
from fastflower.evaluation.session import EvaluationSettings, open_session
from fastflower.evaluation.submission import labels_of
from fastflower.evaluation.trained_run import open_trained
from fastflower.files import require_writable
from fastflower.runtime.run_folder import RunFolder
from fastflower.training.metrics import Evaluation

Method = Literal["vote", "mean", "weighted"]

FLOOR = float(np.finfo(np.float32).tiny)  # below what a probability counts as, since 0 has no logarithm
TOLERANCE = 1e-10  # of the mean log likelihood
ITERATIONS = 10_000


@dataclass(frozen=True)
class Member:
    """What one network says."""

    name: str  # for messages and tables: its run folder or file
    predictions: Predictions


@dataclass(frozen=True)
class Row:
    """A line of `table`."""

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
    joined, weights, notes = _join(members), None, []
    if sample:
        labels_of(joined[0].classes, joined[0].ids.tolist(), sample)
    members, others = _find_all(paths, method, split, roots, fit_on, console)
    joined = _join(members)
    if others:
        weights = fit_weights(others)
        if others is members:
            notes.append("The weights were fitted on these very pictures, which flatters the ensemble's figures.")
    combined = combine(members, method, weights)
    rows = []
    if combined.labelled:
        known = [replace(each, labels=combined.labels) for each in joined]
        shares = [None] * len(members) if weights is None else weights.tolist()
        rows = [Row(each.name, figures(own), w) for each, own, w in zip(members, known, shares, strict=True)]
        rows.append(Row(method, figures(combined)))
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
    joined = _join(members)
    if method != "weighted":
        return members, []
    others, labelled = members, bool((_labels(joined) != NO_LABEL).all())
    if fit_on or not labelled:
        if len(fit_on or paths) != len(members):
            raise UserError(f"--fit_on names {len(fit_on)} predictions for {len(members)} members: give one for each.")
        if not fit_on:
            _refuse_files(paths)
        others = [find_member(path, "val", roots, console, ahead=ahead) for path in fit_on or paths]
    _join_labelled(others)
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
    found = path / "cv.json"
    return [path / f"fold-{k}" for k in range(len(json.loads(found.read_bytes())["folds"]))] if found.is_file() else []


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


def combine(members: Sequence[Member], method: Method, weights: np.ndarray | None = None) -> Predictions:
    """The ensemble's predictions, joined by id.

    - vote: the class that is the likeliest for most members; of those with equally many votes the one whose mean
      probability is the highest. The probabilities are (votes + mean probability) / (members + 1).
    - mean: the mean of the members' probabilities.
    - weighted: their mean by `weights` ([members], at least 0), of which only the ratios count.

    Of classes that are equal in all this the first is taken. A true class that some members know is known.

    Raises:
        UserError: fewer than two members, one that is given twice, or members that are not of the same pictures,
            split and classes; names them, and the ids.
    """
    joined = _join(members)
    stacked = np.stack([each.probabilities for each in joined]).astype(np.float64)  # [members, n, C]
    ordered = sorted(range(len(members)), key=lambda k: members[k].name)
    source: dict[str, Any] = {"method": method}
    source["members"] = {members[k].name: members[k].predictions.source for k in ordered}
    if method == "vote":
        mean = _sum(stacked) / len(joined)
        likeliest = np.stack([each.likeliest for each in joined])
        votes = (likeliest[:, :, None] == np.arange(stacked.shape[2])).sum(axis=0)
        best = np.where(votes == votes.max(axis=1, keepdims=True), mean, -1).argmax(axis=1)
        probabilities = (votes + mean) / (len(joined) + 1)
    elif method == "mean":
        probabilities = _sum(stacked) / len(joined)
        best = probabilities.argmax(axis=1)
    else:
        if weights is None or len(weights) != len(joined):
            raise ValueError("a weighted ensemble needs a weight for each member")
        shares = weights / _sum(weights)
        probabilities = _sum(shares[:, None, None] * stacked)
        best = probabilities.argmax(axis=1)
        source["weights"] = {members[k].name: float(shares[k]) for k in ordered}
    return Predictions(
        split=max(each.split for each in joined),  # where some do not say, what the others do
        classes=joined[0].classes,
        ids=joined[0].ids,
        probabilities=to_single(probabilities, best),
        labels=_labels(joined),
        source=source,
    )


def fit_weights(members: Sequence[Member]) -> np.ndarray:
    """Weights [members], summing to one, for which the weighted mean makes the true classes the likeliest.

    Maximum likelihood of the mixture's weights by expectation maximization from equal ones. The mean log likelihood is
    concave in the weights, so it cannot exceed the one reached by more than the largest slope towards a single member,
    max over members of mean(p_member / p_mixture) - 1: the iteration ends where that is below TOLERANCE.

    Raises:
        UserError: as `combine`; or a picture's true class is unknown.
    """
    joined, labels = _join_labelled(members)
    true = np.stack([each.probabilities[np.arange(len(labels)), labels] for each in joined]).astype(np.float64)
    # members by value: whatever order they are given in, the sums below are the same
    order = sorted(range(len(joined)), key=lambda k: true[k].tolist())
    likelihoods = np.maximum(true[order], FLOOR)  # [members, n]
    weights = np.full(len(joined), 1 / len(joined))
    for _ in range(ITERATIONS):
        mixture = (weights[:, None] * likelihoods).sum(axis=0)
        slopes = (likelihoods / mixture).mean(axis=1)
        if slopes.max() < 1 + TOLERANCE:
            break
        weights = weights * slopes
    fitted = np.empty_like(weights)
    fitted[order] = weights / weights.sum()
    return fitted


def figures(predictions: Predictions) -> Evaluation:
    """What `fastflower eval` says of the network whose softmax these probabilities are.

    Raises:
        UserError: a picture's true class is unknown.
    """
    classes = len(predictions.classes)
    _require_labels(predictions.ids, predictions.labels, classes)
    logs = np.log(np.maximum(predictions.probabilities.astype(np.float64), FLOOR))
    return figures_of_scores(logs, predictions.labels)


def table(rows: Sequence[Row]) -> Table:
    """Figures of members and ensemble, for a terminal; weights where there are some."""
    weighted = any(row.weight is not None for row in rows)
    grid = Table("", *["weight"] * weighted, "top-1", "top-5", "macro F1", "loss")
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in rows:
        weight = ["" if row.weight is None else f"{row.weight:.3f}"] * weighted
        found = row.evaluation
        shares = (f"{share:.2%}" for share in (found.accuracy, found.top5))
        grid.add_row(Text(row.name), *weight, *shares, f"{found.macro_f1:.4f}", f"{found.loss:.4f}")
    return grid


def _join(members: Sequence[Member]) -> list[Predictions]:
    """The members' predictions, row by row of the same ids.

    Raises:
        UserError: see `combine`.
    """
    if len(members) < 2:
        raise UserError(f"an ensemble needs two members or more, not {len(members)}: name more runs or files.")
    for one, other in combinations(members, 2):
        if one.name == other.name:
            raise UserError(f"{one.name} is given twice and would count twice: name each member once.")
        if _same(one.predictions, other.predictions):
            raise UserError(
                f"{one.name} and {other.name} are the predictions of one network, which would count twice: "
                "name one of them."
            )
    for member in members:
        refuse_repeated(member.predictions.ids, member.name)
    every = set().union(*(member.predictions.ids.tolist() for member in members))
    for member in members:
        if missing := every.difference(member.predictions.ids.tolist()):
            raise UserError(
                f"{member.name} lacks {some(missing)}, which other members have: predict the same pictures with each."
            )
    joined = [sort_by_id(each) for each in _of_one_order(members)]
    for (one, a), (other, b) in combinations(zip(members, joined, strict=True), 2):
        if (differ := (a.labels != b.labels) & (a.labels != NO_LABEL) & (b.labels != NO_LABEL)).any():
            raise UserError(
                f"{one.name} and {other.name} have different true classes for {some(a.ids[differ].tolist())}: "
                "predict with each from the same data."
            )
    splits = {member.predictions.split: member.name for member in members if member.predictions.split}
    if len(splits) > 1:
        named = " and ".join(f"{name} of {split}" for split, name in sorted(splits.items()))
        raise UserError(f"the members are of several splits, {named}: predict the same split with each.")
    return joined


def _join_labelled(members: Sequence[Member]) -> tuple[list[Predictions], np.ndarray]:
    """The same, and the true classes [n], all of which must be known."""
    joined = _join(members)
    labels = _labels(joined)
    _require_labels(joined[0].ids, labels, len(joined[0].classes))
    return joined, labels


def _same(a: Predictions, b: Predictions) -> bool:
    """Whether two hold what one network, by one kind of views, says: copies of a file, or a run and its file."""
    if not a.source or a.source != b.source:
        return False
    return bool(np.isnan(a.probabilities - b.probabilities).any()) or np.array_equal(a.probabilities, b.probabilities)


def _of_one_order(members: Sequence[Member]) -> list[Predictions]:
    """The members' predictions with their classes in one order, which no order of the members has a say in.

    Raises:
        UserError: the classes are not the same.
    """
    lists = [member.predictions.classes for member in members]
    classes = min(lists, key=lambda names: (sum(map(len, names)), names))  # 7 rather than 007
    found = []
    for member in members:
        predictions = in_order_of(classes, member.predictions)
        if predictions is None:
            raise UserError(
                f"{_difference(members[lists.index(classes)], member)}: combine networks of the same classes."
            )
        found.append(predictions)
    return found


def _difference(one: Member, other: Member) -> str:
    a, b = one.predictions.classes, other.predictions.classes
    if len(a) != len(b):
        return f"{one.name} has {len(a)} classes and {other.name} {len(b)}"
    return f"{one.name} has the class {next(name for name in a if name not in b)!r}, which {other.name} lacks"


def _labels(joined: Sequence[Predictions]) -> np.ndarray:
    """True classes [n] as far as one of the members knows them, each of which must have the same ids."""
    return np.max([each.labels for each in joined], axis=0)  # NO_LABEL is below every class


def _require_labels(ids: np.ndarray, labels: np.ndarray, classes: int) -> None:
    unknown = (labels < 0) | (labels >= classes)
    if unknown.any():
        raise UserError(
            f"nothing can be measured or fitted without a true class of 0..{classes - 1} for "
            f"{some(ids[unknown].tolist())}: predict a split that has classes, such as val."
        )


def _sum(values: np.ndarray) -> np.ndarray:
    """Sum along the first axis, the same for any order along it."""
    return np.sort(values, axis=0).sum(axis=0)
