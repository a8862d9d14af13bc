"""Predictions of a trained run: of a split, for ensembles and competitions, or of single pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastflower.arrays import Singles
from fastflower.config import DataConfig
from fastflower.data.names import display_names
from fastflower.data.records import NO_LABEL, Records
from fastflower.data.sources.files import picture_files
from fastflower.errors import UserError
from fastflower.evaluation.predictions import Predictions, read_predictions, sort_by_id, write_predictions
from fastflower.evaluation.score import ready, score, softmax
from fastflower.evaluation.session import EvaluationSettings, Session, input_of, load_split, open_session, source
from fastflower.evaluation.submission import form_of, meaning, write_submission
from fastflower.evaluation.trained_run import Planned, Trained, open_trained
from fastflower.files import require_writable
from fastflower.runtime.run_folder import RunFolder

SHOWN = 3  # classes of a single picture


def predict_run(
    run: Path,
    split: str,
    settings: EvaluationSettings,
    console: Console,
    *,
    out: Path | None = None,
    submission: Path | None = None,
    sample: Path | None = None,
) -> Predictions:
    """Class probabilities of a split by a run's best checkpoint (or the checkpoint file `run`), and files of them.

    Each id is predicted once, from its largest record (see `fastflower.evaluation.session.load_split`).

    Args:
        run: a run folder or a checkpoint file.
        split: train, val or test; it needs no classes.
        settings: which data, and by which views.
        console: where progress is shown.
        out: the predictions file; None = predictions-SPLIT.parquet in the run folder, with the views in its name.
        submission: the competition's CSV; None = none is written.
        sample: a sample submission, whose ids must be those of the records, and its labels names or numbers of the
            classes.

    Raises:
        UserError: no such run, data or views that do not fit it, or a sample that does not fit both.
        Stopped: a signal came.
    """
    trained = open_trained(run)
    out = out or result_of(trained, split, settings)
    with open_session(trained, settings, console) as session:
        with session.ranks.together():
            for path in (out, submission):
                if path and session.ranks.is_main:
                    require_writable(path)
        data, records = load_pictures(trained, split, settings, session, sample=sample)
        made_from = source(trained, split, data, records, settings, session)
        probabilities = _probabilities(trained, data, records, settings, session)
        predictions = _predictions(trained, split, records, probabilities, made_from)
        if session.ranks.is_main:
            for note in hand_in(predictions, out=out, submission=submission, sample=sample):
                session.display.say(note)
    return predictions


def load_pictures(
    planned: Planned, split: str, settings: EvaluationSettings, session: Session, *, sample: Path | None = None
) -> tuple[DataConfig, Records]:
    """The records to predict, each id once (see `load_split`).

    Raises:
        UserError: bad data, an id that is missing or no text, or a sample that does not fit.
    """
    data, records = load_split(planned, split, settings, session, once=True)
    with session.ranks.together():
        _require_ids(records)
        if sample:
            form_of(planned.classes, records.ids.tolist(), sample)
    return data, records


def require_predictable(planned: Planned, split: str, settings: EvaluationSettings, session: Session) -> None:
    """Find out, before a run is trained, what would be refused when it is to predict.

    Raises:
        UserError: as `predict_run`.
    """
    ready(planned, *load_pictures(planned, split, settings, session), settings, session)


def predictions_of(
    trained: Trained,
    split: str,
    settings: EvaluationSettings,
    session: Session,
    *,
    ahead: bool = False,
) -> Predictions:
    """What `predict_run` left in the run folder, if it is of these weights, pictures and views; else predicted and left
    there.

    Args:
        trained: the run.
        split: train, val or test.
        settings: which data, and by which views.
        session: where.
        ahead: predict nothing, but only refuse what would be refused; probabilities that are not there are NaN.

    Raises:
        UserError: as `predict_run`.
    """
    data, records = load_pictures(trained, split, settings, session)
    path = result_of(trained, split, settings)
    with session.ranks.together():
        kept = read_predictions(path) if path.is_file() else None
    wanted = source(trained, split, data, records, settings, session)
    if all(session.ranks.gather(kept is not None and input_of(kept.source) == input_of(wanted))):
        assert kept
        return kept
    if ahead:
        ready(trained, data, records, settings, session)
        unknown = np.full((len(records), len(trained.classes)), np.nan, np.float32)
        return _predictions(trained, split, records, unknown, wanted)
    probabilities = _probabilities(trained, data, records, settings, session)
    predictions = _predictions(trained, split, records, probabilities, wanted)
    if session.ranks.is_main:
        write_predictions(path, predictions)
    return predictions


def result_of(trained: Trained, split: str, settings: EvaluationSettings) -> Path:
    """Where the predictions of a split go in the run folder: those by other views stay."""
    return trained.result(RunFolder(trained.folder).predictions(split, settings.views.suffix))


def _probabilities(
    trained: Trained, data: DataConfig, records: Records, settings: EvaluationSettings, session: Session
) -> Singles:
    """Class probabilities [n, num_classes] float32, on every rank."""
    return softmax(score(trained, data, records, settings, session))


def _predictions(
    trained: Trained, split: str, records: Records, probabilities: Singles, made_from: dict[str, Any]
) -> Predictions:
    """Sorted by id, with the true classes that the network has."""
    of_network = (records.labels >= 0) & (records.labels < len(trained.classes))
    labels = np.where(of_network, records.labels, NO_LABEL)
    return sort_by_id(Predictions(split, trained.classes, records.ids, probabilities, labels, made_from))


def hand_in(
    predictions: Predictions, *, out: Path | None = None, submission: Path | None = None, sample: Path | None = None
) -> list[str]:
    """Write the files that are asked for, the submission in the form of the sample; sentences that say so.

    Raises:
        UserError: see `fastflower.evaluation.submission.form_of`.
    """
    notes: list[str] = []
    if submission:
        form = form_of(predictions.classes, predictions.ids.tolist(), sample)
        write_submission(submission, form, predictions)
        notes.append(f"Submission: {submission}")
        if form.columns is None and (sentence := meaning(predictions.classes, form.labels)):
            notes.append(sentence)
    if out:
        write_predictions(out, predictions)
        notes.append(f"Predictions of {len(predictions.ids)} pictures: {out}")
    return notes


def predict_pictures(
    run: Path,
    paths: tuple[Path, ...],
    settings: EvaluationSettings,
    console: Console,
    *,
    names: str | None = None,
    out: Path | None = None,
) -> tuple[Predictions, list[str]]:
    """Class probabilities of picture files, in their order; a path is the id. A file of them where `out` names one.

    Returns:
        The predictions, and the names to show for the classes (`fastflower.data.names.display_names`).

    Raises:
        UserError: no such run, a file that is no picture that can be decoded, or names that are not the classes'.
        Stopped: a signal came.
    """
    trained = open_trained(run)
    shown = display_names(trained.classes, names)
    with open_session(trained, settings, console) as session:
        with session.ranks.together():
            if out and session.ranks.is_main:
                require_writable(out)
            records = picture_files(paths)
        data = trained.data(None, None)
        made_from = source(trained, None, data, records, settings, session)
        probabilities = _probabilities(trained, data, records, settings, session)
        predictions = Predictions("", trained.classes, records.ids, probabilities, records.labels, made_from)
        if out and session.ranks.is_main:
            write_predictions(out, predictions)
    return predictions, shown


def likeliest(predictions: Predictions, shown: list[str]) -> list[str]:
    """A line for each picture: its id, and the SHOWN likeliest classes with their probabilities."""
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
