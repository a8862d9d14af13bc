"""Predictions of a trained run of a split, for ensembles and competitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastflower.arrays import Singles
from fastflower.config import DataConfig
from fastflower.data.names import display_names
from fastflower.data.records import NO_LABEL, Records
from fastflower.errors import UserError
from fastflower.evaluation.answers import TOP, answers_writer, require_form, require_top
from fastflower.evaluation.predictions import Predictions, read_predictions, sort_by_id, write_predictions
from fastflower.evaluation.score import ready, score, softmax
from fastflower.evaluation.session import EvaluationSettings, Session, input_of, load_split, open_session, source
from fastflower.evaluation.submission import form_of, meaning, write_submission
from fastflower.evaluation.trained_run import Planned, Trained, open_trained
from fastflower.files import require_writable
from fastflower.runtime.run_folder import RunFolder

KEY = "id"  # what the ids are called where they are written


def predict_run(
    run: Path,
    split: str,
    settings: EvaluationSettings,
    console: Console,
    *,
    out: Path | None = None,
    submission: Path | None = None,
    sample: Path | None = None,
    names: str | None = None,
    top: int = TOP,
) -> tuple[Predictions, list[str]]:
    """Class probabilities of a split by a run's best checkpoint (or the checkpoint file `run`), and files of them.

    Each id is predicted once, from its largest record (see `fastflower.evaluation.session.load_split`).

    Args:
        run: a run folder or a checkpoint file.
        split: train, val or test; it needs no classes.
        settings: which data, and by which views.
        console: where progress is shown.
        out: the predictions file (see `fastflower.evaluation.answers.answers_writer`); None =
            predictions-SPLIT.parquet in the run folder, with the views in its name.
        submission: the competition's CSV; None = none is written.
        sample: a sample submission, whose ids must be those of the records, and its labels names or numbers of the
            classes.
        names: of the classes, for `out`, as `fastflower.data.names.display_names` takes it.
        top: how many classes of a picture are written into CSV and JSON.

    Returns:
        The predictions, and the names to show for the classes.

    Raises:
        UserError: no such run, data or views that do not fit it, a sample that does not fit both, or a file that cannot
            be written.
        Stopped: a signal came.
    """
    require_top(top)
    trained = open_trained(run)
    out = out or result_of(trained, split, settings)
    shown = display_names(trained.classes, names)
    with open_session(trained, settings, console) as session:
        with session.ranks.together():
            if session.ranks.is_main:
                require_form(out)
                if submission:
                    require_writable(submission)
        data, records = load_pictures(trained, split, settings, session, sample=sample)
        made_from = source(trained, split, data, records, settings, session)
        probabilities = _probabilities(trained, data, records, settings, session)
        predictions = _predictions(trained, split, records, probabilities, made_from)
        if session.ranks.is_main:
            files = {"out": out, "submission": submission, "sample": sample}
            for note in hand_in(predictions, **files, names=shown, top=top):
                session.display.say(note)
    return predictions, shown


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
    predictions: Predictions,
    *,
    out: Path | None = None,
    submission: Path | None = None,
    sample: Path | None = None,
    names: list[str] | None = None,
    top: int = TOP,
) -> list[str]:
    """Write the files that are asked for, the submission in the form of the sample; sentences that say so.

    `names` are what the classes are called in the predictions file, and `top` says how many of them CSV and JSON name.

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
        names = display_names(predictions.classes, None) if names is None else names
        with answers_writer(out, predictions, names, KEY, top) as write:
            write(predictions)
        notes.append(f"Predictions of {len(predictions)} pictures: {out}")
    return notes


def _require_ids(records: Records) -> None:
    """Raise UserError naming the first record without an id, or with one that cannot be written as UTF-8."""
    records.require("id")
    for index, name in enumerate(records.ids.tolist()):
        try:
            name.encode()
        except UnicodeEncodeError as error:  # a file's name may be any bytes
            raise UserError(f"{records.describe(index)!r} has a name that is not UTF-8: rename it.") from error
