"""Predictions of a trained run: of a split, for ensembles and competitions, or of single pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from fastflower.config import Data
from fastflower.data.folder import picture_files
from fastflower.data.names import display_names
from fastflower.data.records import NO_LABEL, Records
from fastflower.data.selection import digest_of
from fastflower.engine.run import RunFolder
from fastflower.engine.scores import probabilities, score
from fastflower.engine.testing import Session, Testing, load_split, session
from fastflower.engine.trained import Trained, open_trained, weights_digest
from fastflower.errors import UserError
from fastflower.files import require_writable
from fastflower.predictions import Predictions, read_predictions, sort_by_id, write_predictions
from fastflower.submission import labels_of, meaning, write_submission

SHOWN = 3  # classes of a single picture


def predict_run(
    run: Path,
    split: str,
    testing: Testing,
    console: Console,
    *,
    out: Path | None = None,
    submission: Path | None = None,
    sample: Path | None = None,
) -> Predictions:
    """Class probabilities of a split by a run's best checkpoint (or the checkpoint file `run`), and files of them.

    Each id is predicted once, from its largest record (see `fastflower.engine.testing.load_split`).

    Args:
        run: a run folder or a checkpoint file.
        split: train, val or test; it needs no classes.
        testing: which data, and by which views.
        console: where progress is shown.
        out: the predictions file; None = predictions-SPLIT.parquet in the run folder.
        submission: the competition's CSV; None = none is written.
        sample: a sample submission, whose ids must be those of the records, and its labels names or numbers of the
            classes.

    Raises:
        UserError: no such run, data or views that do not fit it, or a sample that does not fit both.
        Interrupted: a signal came.
    """
    trained = open_trained(run)
    out = out or trained.result(RunFolder(trained.folder).predictions(split))
    with session(trained, testing, console) as within:
        with within.ranks.together():
            for path in (out, submission):
                if path and within.ranks.is_main:
                    require_writable(path)
        data, records = load_pictures(trained, split, testing, within, sample=sample)
        predictions = _predict(trained, split, data, records, testing, within)
        if within.ranks.is_main:
            for note in hand_in(predictions, out=out, submission=submission, sample=sample):
                within.display.say(note)
    return predictions


def load_pictures(
    trained: Trained, split: str, testing: Testing, within: Session, *, sample: Path | None = None
) -> tuple[Data, Records]:
    """The records to predict, each id once (see `load_split`).

    Raises:
        UserError: bad data, an id that is missing or no text, or a sample that does not fit.
    """
    data, records = load_split(trained, split, testing, within, once=True)
    with within.ranks.together():
        _require_ids(records)
        if sample:
            labels_of(trained.classes, records.ids.tolist(), sample)
    return data, records


def predictions_of(
    trained: Trained, split: str, testing: Testing, within: Session, *, any_views: bool = False
) -> Predictions:
    """What `predict_run` left in the run folder, if it is of these weights and records; else predicted and left there.

    Args:
        trained: the run.
        split: train, val or test.
        testing: which data, and by which views.
        within: where.
        any_views: take what is there also if it was made by other views.

    Raises:
        UserError: as `predict_run`.
    """
    data, records = load_pictures(trained, split, testing, within)
    path = trained.result(RunFolder(trained.folder).predictions(split))
    with within.ranks.together():
        found = read_predictions(path) if path.is_file() else None
    wanted = source(trained, records, testing)
    if any_views and found:
        wanted["views"] = found.source.get("views")
    if all(within.ranks.gather(found is not None and found.source == wanted)):
        assert found
        return found
    predictions = _predict(trained, split, data, records, testing, within)
    if within.ranks.is_main:
        write_predictions(path, predictions)
    return predictions


def _predict(
    trained: Trained, split: str, data: Data, records: Records, testing: Testing, within: Session
) -> Predictions:
    """Class probabilities, sorted by id, on every rank."""
    found = probabilities(score(trained, data, records, testing, within))
    known = (records.labels >= 0) & (records.labels < len(trained.classes))
    labels = np.where(known, records.labels, NO_LABEL)
    made_from = source(trained, records, testing)
    return sort_by_id(Predictions(split, trained.classes, records.ids, found, labels, made_from))


def source(trained: Trained, records: Records, testing: Testing) -> dict[str, object]:
    """What a predictions file says of where it comes from."""
    return {
        "run": trained.folder.name,
        "weights": weights_digest(trained),
        "records": digest_of(records),
        "views": {"crops": testing.views.crops, "scales": list(testing.views.scales)},
    }


def hand_in(
    predictions: Predictions, *, out: Path | None = None, submission: Path | None = None, sample: Path | None = None
) -> list[str]:
    """Write the files that are asked for, the submission in the form of the sample; sentences that say so.

    Raises:
        UserError: see `fastflower.submission.labels_of`.
    """
    notes: list[str] = []
    if submission:
        ids, classes = predictions.ids.tolist(), predictions.classes
        labels = labels_of(classes, ids, sample)
        found = [labels[place] for place in predictions.likeliest.tolist()]
        write_submission(submission, dict(zip(ids, found, strict=True)), set(ids), labels)
        notes += filter(None, (f"Submission: {submission}", meaning(classes, labels)))
    if out:
        write_predictions(out, predictions)
        notes.append(f"Predictions of {len(predictions.ids)} pictures: {out}")
    return notes


def predict_pictures(
    run: Path, paths: tuple[Path, ...], testing: Testing, console: Console, *, out: Path | None = None
) -> Predictions:
    """Class probabilities of picture files, in their order; a path is the id. A file of them where `out` names one.

    Raises:
        UserError: no such run, or a file that is no picture that can be decoded.
        Interrupted: a signal came.
    """
    trained = open_trained(run)
    with session(trained, testing, console) as within:
        with within.ranks.together():
            if out and within.ranks.is_main:
                require_writable(out)
            records = picture_files(paths)
        found = probabilities(score(trained, trained.data(None, None), records, testing, within))
        predictions = Predictions(
            "", trained.classes, records.ids, found, records.labels, source(trained, records, testing)
        )
        if out and within.ranks.is_main:
            write_predictions(out, predictions)
    return predictions


def likeliest(predictions: Predictions, names: str | None) -> list[str]:
    """A line for each picture: its id, and the SHOWN likeliest classes with their probabilities.

    Raises:
        UserError: `names` are not those of the classes (`fastflower.data.names.display_names`).
    """
    shown = display_names(predictions.classes, names)
    order = np.argsort(-predictions.probabilities, axis=1, kind="stable")[:, :SHOWN]
    return [
        f"{name}  " + "  ".join(f"{shown[k]} {row[k]:.1%}" for k in best)
        for name, row, best in zip(predictions.ids, predictions.probabilities, order, strict=True)
    ]


def _require_ids(records: Records) -> None:
    """Raise UserError naming the first record without an id, or with one that cannot be written as UTF-8."""
    records.require("id")
    for index, name in enumerate(records.ids.tolist()):
        try:
            name.encode()
        except UnicodeEncodeError as error:  # a file's name may be any bytes
            raise UserError(f"{records.describe(index)!r} has a name that is not UTF-8: rename it.") from error
